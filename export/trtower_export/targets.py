"""Settle which TensorRT builds a plan, for which GPUs and how, before any work is done."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from trtower.errors import BackendError, ConfigError, MissingExtraError
from trtower.flavour import FLAVOURS, capability_obstacle, known_capabilities, load_flavour
from trtower.manifest import BuildSettings

if TYPE_CHECKING:
    from types import ModuleType

NEEDS = {"bf16": 8.0, "fp8": 8.9}
"""The first compute capability that has a format; for those before TensorRT refuses the graph."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a plan is built for, and how.

    No compute capability: TensorRT-RTX's portable form, or the GPU that is here.
    """

    flavour: str
    compute_capabilities: tuple[str, ...] = ()
    settings: BuildSettings = field(default_factory=BuildSettings)


def choose_target(
    flavour: str, compute_capabilities: tuple[str, ...], precision: str, settings: BuildSettings | None = None
) -> tuple[Target | None, str]:
    """Settle which TensorRT builds, and for which GPUs, before any work is done; also say it in words.

    ``flavour`` "auto" takes the TensorRT of this machine's GPU, then TensorRT-RTX, which needs none; where neither
    is installed there is no target, as with "none". Raises ConfigError and MissingExtraError.
    """
    if flavour not in ("auto", "none", *FLAVOURS):
        raise ConfigError(f"flavour {flavour!r} is unknown: auto, none, {', '.join(FLAVOURS)} are known.")
    if flavour == "none":
        if compute_capabilities:
            raise ConfigError("--compute-capability is for a plan, and --flavour none builds no plan.")
        return None, "no plan, as asked: `trtower build` makes one where the tower is served"
    reason = f"flavour {flavour}"
    if flavour == "auto":
        flavour, reason = _auto_flavour()
        if flavour == "none":
            if compute_capabilities:
                raise MissingExtraError(f"--compute-capability is for a plan, and {reason}")
            return None, reason
    module = load_flavour(flavour)
    _check_capabilities(flavour, module, compute_capabilities, precision)
    if flavour == "tensorrt-rtx" and precision == "fp8" and not compute_capabilities:
        # The portable form builds with FP8, and claims GPUs that have none.
        compute_capabilities = tuple(c for c in known_capabilities(module) if float(c) >= NEEDS["fp8"])
        reason += f", for compute capability {', '.join(compute_capabilities)}, which have fp8"
    settings = settings or BuildSettings()
    if settings.hardware_compatible and (flavour == "tensorrt-rtx" or compute_capabilities):
        raise ConfigError(
            "--hardware-compatible is for flavour tensorrt, for every GPU from Ampere on; TensorRT-RTX makes such a "
            "plan where no --compute-capability is named."
        )
    if settings.stripped and not torch.cuda.is_available():
        raise BackendError("--strip: TensorRT builds a plan without its weights where a GPU is, and torch finds none.")
    if flavour == "tensorrt" and not settings.hardware_compatible:
        compute_capabilities = ("{}.{}".format(*torch.cuda.get_device_capability()),)
    capabilities = tuple(sorted(set(compute_capabilities), key=float))
    if torch.cuda.is_available():
        here = "{}.{}".format(*torch.cuda.get_device_capability())
        if obstacle := capability_obstacle(flavour, module, capabilities, here):
            reason += f"; the plan is for other machines than this one: it {obstacle}"
    return Target(flavour=flavour, compute_capabilities=capabilities, settings=settings), reason


def _auto_flavour() -> tuple[str, str]:
    missing = []
    for flavour in FLAVOURS:
        try:
            load_flavour(flavour)
        except MissingExtraError as err:
            missing.append(str(err))
            continue
        if flavour == "tensorrt" and not torch.cuda.is_available():
            missing.append("flavour tensorrt builds on its GPU, and none is here")
            continue
        return flavour, f"flavour {flavour}" + (f" ({'; '.join(missing)})" if missing else "")
    return "none", "no plan is built, for want of a TensorRT: " + "; ".join(missing)


def _check_capabilities(flavour: str, module: "ModuleType", capabilities: tuple[str, ...], precision: str) -> None:
    if flavour == "tensorrt":
        if not torch.cuda.is_available():
            raise BackendError("flavour tensorrt builds on the GPU it runs on, and torch finds none here.")
        known = built = ["{}.{}".format(*torch.cuda.get_device_capability())]
    else:
        known, built = known_capabilities(module), [*capabilities]
    for capability in capabilities:
        if capability not in known:
            raise ConfigError(
                f"compute capability {capability!r} is not one that {flavour} {module.__version__} builds for here: "
                f"{', '.join(known)} are."
            )
    for capability in built:
        if float(capability) < NEEDS.get(precision, 0.0):
            raise ConfigError(
                f"{precision} needs compute capability {NEEDS[precision]} or later, and this plan would be for "
                f"{capability}: use fp16."
            )
