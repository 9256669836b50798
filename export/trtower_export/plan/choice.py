"""Choose which TensorRT builds a plan, for which GPUs and how, before any work is done."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trtower.bundle.manifest import PLANS, BuildSettings, PlanEntry
from trtower.bundle.suggest import build_command
from trtower.errors import BackendError, ConfigError, MissingExtraError
from trtower.extras import how_to_install, import_extra
from trtower.flavour import (
    FLAVOURS,
    PLATFORM,
    PORTABLE_FROM,
    capability_obstacle,
    known_capabilities,
    load_flavour,
    sm_name,
)
from trtower.names import check_name, list_choices
from trtower.runners.device import JETSON, capability_of, default_device, device_obstacle, has_gpu
from trtower.runners.runtimes import parse_obstacle
from trtower.spec import PRECISIONS
from trtower_export.console import Progress
from trtower_export.targets.faults import check_faults

if TYPE_CHECKING:
    from types import ModuleType

PLAIN = BuildSettings()
"""TensorRT's own settings."""

FIRST_GENERATION = 5.0
"""The oldest compute capability that is accepted. "10" reads as 1.0, so it is refused, and the error suggests 10.0."""

DATA_CENTRE = "build on that GPU with data-centre TensorRT, from the extra trt-build"
JETPACK = "build on the device with the TensorRT that JetPack brings"
TOO_OLD = "serve it without a plan, with ONNX Runtime from the extra cuda"

ELSEWHERE = {
    "5.0": ("a Maxwell GPU", TOO_OLD),
    "5.2": ("a Maxwell GPU", TOO_OLD),
    "5.3": ("Jetson Nano", TOO_OLD),
    "6.0": ("a Pascal GPU", TOO_OLD),
    "6.1": ("a Pascal GPU", TOO_OLD),
    "6.2": ("Jetson TX2", TOO_OLD),
    "7.0": ("Volta", TOO_OLD),
    "7.2": ("Jetson Xavier", TOO_OLD),
    "8.7": ("Jetson Orin", JETPACK),
    "9.0": ("Hopper", DATA_CENTRE),
    "10.0": ("data-centre Blackwell", DATA_CENTRE),
    "10.1": ("Jetson Thor", JETPACK),
    "10.3": ("data-centre Blackwell", DATA_CENTRE),
    "11.0": ("Jetson Thor", JETPACK),
}
"""GPUs that TensorRT-RTX does not support: what they are, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class PlanChoice:
    """What a plan is built for, and how.

    Without compute capabilities the plan is TensorRT-RTX's portable one, or TensorRT's hardware-compatible one.
    """

    flavour: str
    compute_capabilities: tuple[str, ...] = ()
    settings: BuildSettings = field(default_factory=BuildSettings)


def choose_plan(
    flavour: str,
    compute_capabilities: Sequence[str],
    precision: str,
    settings: BuildSettings = PLAIN,
    there: str | None = None,
) -> tuple[PlanChoice | None, str]:
    """Choose a plan's TensorRT and GPUs before any work is done; also return the choice in words.

    ``flavour`` "auto" prefers "tensorrt", which needs a GPU, to "tensorrt-rtx", which needs none. If neither can build
    here, the choice is None, as with "none"; both raise an error instead if ``compute_capabilities`` are named. These
    may be in any form that `read_capabilities` accepts. Errors that send the user to another machine say ``there``, by
    default what `build_there` says of a bundle that does not exist yet. Raises ConfigError, BackendError and
    MissingExtraError.
    """
    check_name("flavour", flavour, ("auto", "none", *FLAVOURS))
    compute_capabilities = read_capabilities(compute_capabilities)
    if flavour == "none":
        if compute_capabilities:
            raise ConfigError("--compute-capability is for a plan, but --flavour none builds no plan: drop one.")
        return None, "no plan (--flavour none): a CPU needs none; on a GPU server, `trtower build` makes one"
    reason, there = f"flavour {flavour}", there or build_there(None, settings)
    if flavour == "auto":
        flavour, reason = _auto_flavour()
    if flavour == "tensorrt" and not torch.cuda.is_available():
        needs = "flavour tensorrt builds on the GPU that runs the plan, and"
        if has_gpu():
            raise BackendError(f"{needs} {device_obstacle(default_device('cuda'))}")
        raise BackendError(f"{needs} torch finds no GPU here: {there}")
    if flavour != "tensorrt":
        _refuse_elsewhere(compute_capabilities, there)
    if flavour == "none":
        if compute_capabilities:
            raise MissingExtraError(f"--compute-capability is for a plan, but {reason}")
        return None, reason
    choice, remark = _settle(flavour, compute_capabilities, precision, settings, there)
    return choice, reason + remark


def _settle(
    flavour: str, compute_capabilities: tuple[str, ...], precision: str, settings: BuildSettings, there: str
) -> tuple[PlanChoice, str]:
    """Decide which GPUs a plan is for; return the choice, and a remark for the user or "".

    Raises ConfigError, BackendError or MissingExtraError if no such plan can be built here.
    """
    module, remark = load_builder(flavour), ""
    _check_capabilities(flavour, module, compute_capabilities, precision, there)
    needed = PRECISIONS[precision].first_capability
    if flavour == "tensorrt-rtx" and needed > float(PORTABLE_FROM) and not compute_capabilities:
        # A portable plan with FP8 builds, but claims to run on GPUs without FP8.
        compute_capabilities = tuple(c for c in known_capabilities(module) if float(c) >= needed)
        remark = f", for the GPUs with {precision}: compute capability {', '.join(compute_capabilities)}"
    _check_settings(settings, flavour, compute_capabilities)
    if flavour == "tensorrt" and not settings.hardware_compatible:
        compute_capabilities = (capability_of(),)
    capabilities = tuple(sorted(set(compute_capabilities), key=float))
    here = capability_of() if torch.cuda.is_available() else None
    if here and (obstacle := capability_obstacle(flavour, module, capabilities, here)):
        remark += f"; the plan cannot run on this machine: it {obstacle}"
    return PlanChoice(flavour=flavour, compute_capabilities=capabilities, settings=settings), remark


def read_capabilities(written: Sequence[str]) -> tuple[str, ...]:
    """Parse compute capabilities as people write them: "8.9", "89", "sm_89", or several of these in one string.

    Returns each once, as "8.9". Raises ConfigError with the right form.
    """
    parts = [part for each in written for part in re.split(r"[,;\s]+", str(each).strip())]
    return tuple(dict.fromkeys(_read_capability(part) for part in parts))


def _read_capability(part: str) -> str:
    match = re.fullmatch(r"(?:(?:sm|compute)_?)?(\d{1,2})\.?(\d)[af]?", part.lower())
    if match and float(capability := f"{match[1]}.{match[2]}") >= FIRST_GENERATION:
        return capability
    meant = f"; did you mean {part}.0?" if re.fullmatch(r"[5-9]|1\d", part) else ";"
    raise ConfigError(
        f"{part!r} is not a compute capability{meant} write it as in --compute-capability 8.9. To see your GPU's, run: "
        "nvidia-smi --query-gpu=compute_cap --format=csv"
    )


def build_there(bundle: Path | None, settings: BuildSettings = PLAIN, accept_known_faults: Sequence[str] = ()) -> str:
    """Say how to build a plan of data-centre TensorRT elsewhere; without ``bundle``, also how to get a bundle there."""
    here = "export with --flavour none, copy the bundle" if bundle is None else f"copy {bundle}"
    name = Path("BUNDLE") if bundle is None else Path(bundle.resolve().name)
    command = build_command(name, "tensorrt", accept_known_faults=accept_known_faults, settings=settings)
    return f"{here} to that GPU's machine, and run there: {command}"


def _refuse_elsewhere(capabilities: Sequence[str], there: str) -> None:
    """Raise ConfigError, with an alternative, for a GPU that TensorRT-RTX does not support."""
    for capability in capabilities:
        if capability in ELSEWHERE:
            gpu, instead = ELSEWHERE[capability]
            raise ConfigError(
                f"compute capability {capability} is {gpu}, which TensorRT-RTX does not support: {instead}"
                + ("" if instead is TOO_OLD else f"; {there}")
            )


def load_builder(flavour: str) -> "ModuleType":
    """Import a flavour; if it or Polygraphy is missing, raise MissingExtraError with the extra that brings both."""
    name, extra = FLAVOURS[flavour]
    try:
        module = load_flavour(flavour)
    except MissingExtraError as err:
        install = how_to_install(f"{extra}-build")
        if flavour == "tensorrt" and JETSON.exists():
            install = "JetPack brings it, for an environment made with python3 -m venv --system-site-packages"
        raise MissingExtraError(f"building a {flavour} plan needs the package {name}: {install}") from err
    import_extra("polygraphy", extra="build", purpose=f"building a {flavour} plan")
    return module


def _auto_flavour() -> tuple[str, str]:
    missing = []
    for flavour in FLAVOURS:
        if flavour == "tensorrt" and not torch.cuda.is_available():
            missing.append("flavour tensorrt needs a GPU, and there is none here")
            continue
        try:
            load_builder(flavour)
            return flavour, f"flavour {flavour}" + (f" ({'; '.join(missing)})" if missing else "")
        except MissingExtraError as err:
            missing.append(str(err))
    return "none", "no plan is built, because no TensorRT can build here: " + "; ".join(missing)


def _check_capabilities(
    flavour: str, module: "ModuleType", capabilities: Sequence[str], precision: str, there: str
) -> None:
    if flavour == "tensorrt":
        here = capability_of()
        if others := [each for each in capabilities if each != here]:
            raise ConfigError(
                f"flavour tensorrt builds only for this machine's GPU, of compute capability {here}, and not for "
                f"{list_choices(others)}: {there}"
            )
        built = [here]
    else:
        known, built = known_capabilities(module), [*capabilities]
        for capability in capabilities:
            if capability not in known:
                raise ConfigError(
                    f"{flavour} {module.__version__} cannot build for compute capability {capability!r}; choose "
                    f"{list_choices(known)}."
                )
    needed = PRECISIONS[precision].first_capability
    for capability in built:
        if float(capability) < needed:
            raise ConfigError(
                f"{precision} needs compute capability {needed} or later, but this plan is for {capability}: export "
                "with --precision fp16."
            )


def _check_settings(settings: BuildSettings, flavour: str, capabilities: Sequence[str]) -> None:
    """Refuse settings that this flavour, these GPUs or this machine cannot build with."""
    if settings.hardware_compatible and (flavour == "tensorrt-rtx" or capabilities):
        raise ConfigError(
            "--hardware-compatible needs flavour tensorrt and no --compute-capability: it builds for every GPU from "
            "Ampere on. TensorRT-RTX builds such a plan without either option."
        )
    if settings.version_compatible and flavour == "tensorrt-rtx":
        raise ConfigError(
            "--version-compatible needs flavour tensorrt: TensorRT-RTX has no lean runtime. Run this on the GPU that "
            "will run the plan, with the extra trt-build."
        )
    if settings.version_compatible and settings.stripped:
        raise ConfigError(
            "--version-compatible and --strip exclude each other: the lean runtime cannot read the weights of a graph."
        )
    if settings.stripped and not torch.cuda.is_available():
        raise BackendError(
            "--strip needs a GPU to build a plan without its weights, and torch finds none: build without --strip."
        )


def check_builder(
    choice: PlanChoice, first_tensorrt: str, family: str, precision: str, accepted: Sequence[str], progress: Progress
) -> None:
    """Refuse a TensorRT that cannot parse a graph, or has a known fault here that is not accepted.

    ``first_tensorrt`` is the first that parses the graph. Raises ConfigError.
    """
    version = load_flavour(choice.flavour).__version__
    if obstacle := parse_obstacle(first_tensorrt, choice.flavour, version):
        raise ConfigError(obstacle)
    if choice.flavour == "tensorrt":  # the faults are not those of TensorRT-RTX
        check_faults(version, (capability_of(),), PLATFORM, family, precision, accepted, progress.say)


def make_entry(choice: PlanChoice) -> PlanEntry:
    """Return the manifest's entry for a plan for ``choice``, built by the installed TensorRT."""
    version = load_flavour(choice.flavour).__version__
    gpus = "+".join(sm_name(capability) for capability in choice.compute_capabilities)
    return PlanEntry(
        file=f"{PLANS}/{choice.flavour}-{version}.{gpus or 'any'}.plan",
        flavour=choice.flavour,
        version=version,
        platform=PLATFORM,
        compute_capabilities=choice.compute_capabilities,
        settings=choice.settings,
    )
