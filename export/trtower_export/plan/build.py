"""Add a plan to a bundle: one that is in the store, or one that is built now.

This is the one way for a plan into a bundle, after an export and with `trtower build`:

    add_plan            settles the target, which an export has done before
    └── build_into      takes the plan from the store, or builds it, and adds it to the bundle
        ├── obtain_plan     what the store has, or keeps once it is built
        ├── _build_verified Polygraphy, on a graph that is compared with its hash
        └── Bundle.add_plan the file into the folder, its entry into the manifest

`trtower build` runs where the tower is served: neither torch models, nor transformers, nor onnx are needed here.
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
from trtower_export.plan.polygraphy import LOG, PLAN, build_plan
from trtower_export.plan.store import fetch_or_build
from trtower_export.plan.targets import Target, build_there, choose_target, make_entry

BUILD_PROCEDURE_VERSION = 2
"""Raise it when the same graph, TensorRT and settings are built in another way: what a store has is older then."""

STAGING = ".staging-"

WAIT_S = 60.0
"""How long to wait while another process writes into the bundle. Copying a plan into it takes about a second."""


def add_plan(
    bundle: Bundle,
    flavour: str,
    compute_capabilities: tuple[str, ...],
    progress: Progress,
    *,
    settings: BuildSettings | None = None,
    store: Path | None = None,
) -> Path:
    """Add a plan to a bundle; it is built unless ``store`` has it already.

    Args:
        bundle: the bundle, whose folder and the one around it can be written.
        flavour: tensorrt, tensorrt-rtx, or auto: what this machine can do.
        compute_capabilities: GPUs to build for, such as ("8.9",); () is a portable plan, or the GPU that is here.
        progress: who is told of every step.
        settings: how to build; TensorRT's defaults unless given.
        store: a folder of plans that were built before (see store.py).

    Returns:
        The plan's path.

    Raises:
        ConfigError, BackendError, MissingExtraError: if no TensorRT here can build such a plan.
        BuildError: if TensorRT refuses, the disk is full, or the bundle is read-only.
        BundleError: if the bundle was altered, or another process writes it.
    """
    check_name("flavour", flavour, ("auto", *FLAVOURS))
    target, reason = choose_target(flavour, compute_capabilities, bundle.manifest.precision, settings, bundle.path)
    if target is None:
        raise MissingExtraError(f"{reason}. For a data-centre GPU or a Jetson, {build_there(bundle.path)}")
    progress.say(reason)
    added = build_into(bundle, target, progress, store)
    return bundle.path / added.manifest.plans[-1].file


def build_into(bundle: Bundle, target: Target, progress: Progress, store: Path | None) -> Bundle:
    """Add the plan for ``target`` to a bundle, and return the bundle with it. Raises as `add_plan`."""
    path = bundle.path.resolve()
    for folder in (path, path.parent):  # the lock lies beside the bundle
        if not os.access(folder, os.W_OK):
            raise BuildError(f"{folder} is read-only, and the plan of {bundle.path} is written there: copy it first.")
    with disk_errors(f"the plan of {bundle.path}"):
        kept = obtain_plan(bundle, target, progress, store) if store else None
        with locked(bundle.path, wait_s=WAIT_S if store else 0.0), _staging(bundle.path) as folder:
            if kept:
                for name in (PLAN, LOG):  # copied: a bundle that shared its files could be damaged through others
                    shutil.copyfile(kept / name, folder / name)
            else:
                _build_verified(bundle, target, progress, folder)
            added = bundle.add_plan(make_entry(target), folder / PLAN, folder / LOG)
    built = added.manifest.plans[-1]
    now = (built.settings, added.manifest.files[built.file])
    for old in bundle.manifest.plans:
        if built.replaces(old) and (old.settings, bundle.manifest.files[old.file]) != now:
            progress.say(f"it takes the place of the plan that was built {old.settings.describe()}")
    return added


@contextmanager
def _staging(bundle: Path) -> Iterator[Path]:
    """Yield a folder inside a bundle, which is gone after the block; remove what a killed build has left."""
    for leftover in bundle.glob(f"{STAGING}*"):
        shutil.rmtree(leftover)
    with TemporaryDirectory(prefix=STAGING, dir=bundle) as folder:
        yield Path(folder)


def obtain_plan(bundle: Bundle, target: Target, progress: Progress, store: Path) -> Path:
    """Return the store's folder of the plan of a bundle's graph, which is built if it is not there.

    Raises BundleError, and keeps nothing, if the graph was altered, or another takes its place while it is read.
    """
    manifest = bundle.manifest
    version = load_flavour(target.flavour).__version__
    gpu = torch.cuda.get_device_name() if target.flavour == "tensorrt" else None
    facts = {
        "graph": manifest.files[GRAPH].sha256,
        "weights": manifest.files[GRAPH_DATA].sha256,
        "tensor": dataclasses.asdict(manifest.input),
        "profiles": [dataclasses.asdict(profile) for profile in manifest.profiles],
        "target": dataclasses.asdict(target),
        "version": version,
        "platform": PLATFORM,
        "way": BUILD_PROCEDURE_VERSION,
        "gpu": gpu,
    }
    timings = "{}-{}.{}.timing".format(target.flavour, version, re.sub(r"\W+", "-", gpu)) if gpu else None
    built = False

    def build(folder: Path) -> None:
        nonlocal built
        built = True
        _build_verified(bundle, target, progress, folder, cache=store / timings if timings else None)

    place = fetch_or_build(store, facts, build, progress)
    for name in () if built else (GRAPH, GRAPH_DATA):  # whoever builds verifies them
        bundle.verify(name)
    return place


def _build_verified(
    bundle: Bundle, target: Target, progress: Progress, folder: Path, *, cache: Path | None = None
) -> None:
    """Build PLAN and LOG in ``folder`` from a graph that is verified, and the same to the end."""
    graph, manifest = bundle.path / GRAPH, bundle.manifest
    with bundle.steady(GRAPH, GRAPH_DATA), progress.step(f"Build the {target.flavour} plan") as step:
        build_plan(graph, target, manifest.input, manifest.profiles, folder, step, mixed=manifest.is_mixed, cache=cache)
