"""The two flavours of TensorRT behind one interface: data-centre `tensorrt` and `tensorrt-rtx`.

Their Python modules define the same names, so the functions here accept the module as a parameter.
"""

import platform
import re
from collections.abc import Sequence
from types import ModuleType

from trtower.errors import MissingExtraError
from trtower.extras import how_to_install, import_extra

FLAVOURS = {"tensorrt": ("tensorrt", "trt"), "tensorrt-rtx": ("tensorrt_rtx", "trt-rtx")}
"""Flavour -> its Python module, and the extra of trtower that provides it."""

LEAN, LEAN_EXTRA = "tensorrt_lean", "trt-lean"
"""The module of TensorRT's lean runtime, which only runs version-compatible plans, and the extra that provides it."""

PLATFORM = f"{platform.system().lower()}-{platform.machine().lower()}"
"""This machine's operating system and processor, such as "linux-x86_64". A plan runs only on the platform that it was
built for."""

PORTABLE_FROM = "8.0"
"""A plan that names no compute capability needs at least Ampere, in both flavours."""


def load_flavour(flavour: str) -> ModuleType:
    """Import a flavour's module; raise MissingExtraError if it is not installed."""
    name, extra = FLAVOURS[flavour]
    module: ModuleType = import_extra(name, extra=extra, purpose=f"flavour {flavour}")
    if not hasattr(module, "Runtime"):  # with only type stubs installed, an empty `tensorrt` can be imported
        raise MissingExtraError(
            f"flavour {flavour} needs the package {name}, but only type stubs are installed: {how_to_install(extra)}"
        )
    return module


def load_lean() -> ModuleType:
    """Import TensorRT's lean runtime; raise MissingExtraError if it is not installed."""
    module: ModuleType = import_extra(LEAN, extra=LEAN_EXTRA, purpose="the lean runtime of TensorRT")
    return module


def parse_version(version: str) -> tuple[int, ...]:
    """Turn a version such as "10.3.0" into numbers that compare: (10, 3, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def is_before(version: str, other: str) -> bool:
    """Return whether a version is older than another, as far as both are written: 10.3.0 is not before 10.3."""
    mine, theirs = parse_version(version), parse_version(other)
    length = min(len(mine), len(theirs))
    return mine[:length] < theirs[:length]


def sm_name(capability: str) -> str:
    """Turn a compute capability such as "8.9" into the form used by NVIDIA's compilers and in file names: "sm89"."""
    return "sm" + capability.replace(".", "")


def known_capabilities(module: ModuleType) -> list[str]:
    """List the compute capabilities that this TensorRT-RTX can build for, such as "8.6", in ascending order."""
    names = [name[2:] for name in module.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"{name[:-1]}.{name[-1]}" for name in names]


def capability_obstacle(
    flavour: str, module: ModuleType | None, compute_capabilities: Sequence[str], here: str
) -> str | None:
    """Say why a plan cannot run on a GPU of compute capability ``here``; None if it can.

    A plan without ``compute_capabilities`` is portable. A portable plan of TensorRT-RTX runs on the GPUs that this
    TensorRT-RTX knows and on newer ones, but not on those in between: Hopper and data-centre Blackwell. ``module`` is
    None if the flavour is not installed; then the GPUs that it knows cannot be listed.
    """
    needs = " or ".join(compute_capabilities)
    runs = here in compute_capabilities
    if not compute_capabilities:
        needs, runs = f"{PORTABLE_FROM} or later", float(here) >= float(PORTABLE_FROM)
        if flavour == "tensorrt-rtx" and module is not None:
            known = [each for each in known_capabilities(module) if float(each) >= float(PORTABLE_FROM)]
            needs, runs = f"{' or '.join(known)} or later", here in known or float(here) > float(known[-1])
    return None if runs else f"needs compute capability {needs}; this GPU has {here}"
