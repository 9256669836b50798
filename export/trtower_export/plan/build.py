"""Add a plan to a bundle, from the store or by building it.

This is the only way a plan gets into a bundle, after an export and with `trtower build`:

    add_plan            chooses what to build for, which an export has already done
    └── build_into      takes the plan from the store or builds it, and adds it to the bundle
        ├── obtain_plan     returns the plan in the store, and builds it first if it is missing
        ├── _build_verified runs Polygraphy on a graph that matches its hash
        └── Bundle.add_plan puts the file into the folder and its entry into the manifest

`trtower build` runs on the serving machine, so nothing here needs torch models, transformers or onnx.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH, GRAPH_DATA, BuildSettings
from trtower.bundle.staging import disk_errors, locked
from trtower.errors import BuildError, MissingExtraError
from trtower.flavour import FLAVOURS, PLATFORM, load_flavour
from trtower.names import check_name
from trtower_export.console import Progress
from trtower_export.plan.choice import PLAIN, PlanChoice, build_there, check_builder, choose_plan, make_entry
from trtower_export.plan.polygraphy import LOG, PLAN, build_plan
from trtower_export.plan.store import fetch_or_build
from trtower_export.targets.faults import check_accepted

BUILD_PROCEDURE_VERSION = 2
"""Increase this if the same graph, TensorRT and settings are built differently. Plans in stores are then outdated."""

STAGING = ".staging-"

WAIT_S = 60.0
"""How long a plan from the store waits while another process writes to the bundle. Copying a plan takes about a second.

Without a store nothing waits: the other process may build for minutes.
"""


def add_plan(
    bundle: Bundle,
    flavour: str,
    compute_capabilities: tuple[str, ...],
    progress: Progress,
    *,
    settings: BuildSettings = PLAIN,
    store: Path | None = None,
    accept_known_faults: tuple[str, ...] = (),
) -> Path:
    """Add a plan to a bundle. Build it unless ``store`` already has it.

    Args:
        bundle: The bundle. Its folder and the parent folder must be writable.
        flavour: "tensorrt", "tensorrt-rtx", or "auto" for that of the bundle's target, or else the one that this
            machine can build with.
        compute_capabilities: GPUs to build for, such as ("8.9",). With () "tensorrt" builds for this machine's GPU, or
            for all from Ampere on if ``settings`` ask for a hardware-compatible plan. "tensorrt-rtx" builds a portable
            plan, or from an FP8 bundle a plan for the GPUs that have FP8; "auto" builds its plan for the target's GPUs.
        progress: Reports every step to the user.
        settings: How to build. Default: as TensorRT does by itself.
        store: A folder of plans that were built before (see store.py); None always builds.
        accept_known_faults: Names of known faults of this TensorRT that do not stop the build.

    Returns:
        The path of the plan.

    Raises:
        ConfigError: If an argument is invalid, or this TensorRT cannot build such a plan.
        BackendError: If the build needs a GPU and there is none, or its driver is too old.
        MissingExtraError: If a package that the build needs is not installed.
        BuildError: If TensorRT refuses, the disk is full, or the bundle or the store is read-only.
        BundleError: If the bundle was altered, or another process is writing to it.
    """
    check_name("flavour", flavour, ("auto", *FLAVOURS))
    check_accepted(accept_known_faults)
    manifest, target = bundle.manifest, bundle.manifest.target
    family, precision = manifest.spec.family, manifest.precision
    if flavour == "auto" and target and target.flavour:
        flavour = target.flavour
        if flavour == "tensorrt-rtx" and not compute_capabilities:
            compute_capabilities = target.compute_capabilities
    there = build_there(bundle.path, settings, accept_known_faults)
    choice, reason = choose_plan(flavour, compute_capabilities, precision, settings, there)
    if choice is None:
        raise MissingExtraError(f"{reason}. For a data-centre GPU or a Jetson, {there}")
    progress.say(reason)
    check_builder(choice, manifest.first_tensorrt, family, precision, accept_known_faults, progress)
    added = build_into(bundle, choice, progress, store)
    return bundle.path / added.manifest.plans[-1].file


def build_into(bundle: Bundle, choice: PlanChoice, progress: Progress, store: Path | None) -> Bundle:
    """Add the plan for ``choice`` to a bundle and return the new bundle. Raises the errors of `add_plan`."""
    path = bundle.path.resolve()
    for folder in (path, path.parent):  # the lock file is beside the bundle
        if not os.access(folder, os.W_OK):
            raise BuildError(
                f"{folder} is read-only, and adding a plan to {bundle.path} writes there: copy the bundle to a "
                "writable folder."
            )
    with disk_errors(f"the plan of {bundle.path}"):
        kept = obtain_plan(bundle, choice, progress, store) if store else None
        with locked(bundle.path, wait_s=WAIT_S if store else 0.0), _staging(bundle.path) as folder:
            if kept:
                for name in (PLAN, LOG):  # copied, not linked: damage to a shared file would spread
                    shutil.copyfile(kept / name, folder / name)
            else:
                _build_verified(bundle, choice, progress, folder)
            added = bundle.add_plan(make_entry(choice), folder / PLAN, folder / LOG)
    built = added.manifest.plans[-1]
    now = (built.settings, added.manifest.files[built.file])
    for old in bundle.manifest.plans:
        if built.replaces(old) and (old.settings, bundle.manifest.files[old.file]) != now:
            progress.say(f"the new plan replaces the one that was built {old.settings.describe()}")
    return added


@contextmanager
def _staging(bundle: Path) -> Iterator[Path]:
    """Yield a temporary folder inside a bundle, and first remove what killed builds left."""
    for leftover in bundle.glob(f"{STAGING}*"):
        shutil.rmtree(leftover)
    with TemporaryDirectory(prefix=STAGING, dir=bundle) as folder:
        yield Path(folder)


def obtain_plan(bundle: Bundle, choice: PlanChoice, progress: Progress, store: Path) -> Path:
    """Return the store's folder with the plan of a bundle's graph, and build the plan first if it is missing.

    Raises BundleError, and stores nothing, if the graph was altered, or is replaced while it is read.
    """
    manifest = bundle.manifest
    version = load_flavour(choice.flavour).__version__
    gpu = torch.cuda.get_device_name() if choice.flavour == "tensorrt" else None
    facts = {
        "graph": manifest.files[GRAPH].sha256,
        "weights": manifest.files[GRAPH_DATA].sha256,
        "tensor": dataclasses.asdict(manifest.input),
        "profiles": [dataclasses.asdict(profile) for profile in manifest.profiles],
        "choice": dataclasses.asdict(choice),
        "version": version,
        "platform": PLATFORM,
        "way": BUILD_PROCEDURE_VERSION,
        "gpu": gpu,
    }
    timings = "{}-{}.{}.timing".format(choice.flavour, version, re.sub(r"\W+", "-", gpu)) if gpu else None
    built = False

    def build(folder: Path) -> None:
        nonlocal built
        built = True
        _build_verified(bundle, choice, progress, folder, cache=store / timings if timings else None)

    place = fetch_or_build(store, facts, build, progress)
    for name in () if built else (GRAPH, GRAPH_DATA):  # a build has verified them
        bundle.verify(name)
    return place


def _build_verified(
    bundle: Bundle, choice: PlanChoice, progress: Progress, folder: Path, *, cache: Path | None = None
) -> None:
    """Build PLAN and LOG in ``folder``; raise BundleError if the graph was altered or changes during the build."""
    graph, manifest = bundle.path / GRAPH, bundle.manifest
    with bundle.steady(GRAPH, numbers=GRAPH_DATA), progress.step(f"Build the {choice.flavour} plan") as step:
        build_plan(
            graph,
            choice,
            manifest.input,
            manifest.profiles,
            folder,
            step,
            dtype=manifest.output.dtype,
            mixed=manifest.is_mixed,
            cache=cache,
        )
