"""The two TensorRTs behind one name: data-centre `tensorrt` and `tensorrt-rtx`.

Their Python modules have the same names inside, so all code here takes the module as a parameter.
"""

import platform
from collections.abc import Sequence
from types import ModuleType

from trtower.errors import MissingExtraError
from trtower.extras import how_to_install, import_extra

FLAVOURS = {"tensorrt": ("tensorrt", "trt"), "tensorrt-rtx": ("tensorrt_rtx", "trt-rtx")}
"""Flavour -> its Python module, and the extra of trtower that brings it."""

PLATFORM = f"{platform.system().lower()}-{platform.machine().lower()}"
"""Plans are bound to the operating system and processor they were built for."""

PORTABLE_FROM = "8.0"
"""Plans that name no compute capability start at Ampere, with either TensorRT."""


def load_flavour(flavour: str) -> ModuleType:
    """Import a flavour's module; raise MissingExtraError where it is not installed."""
    name, extra = FLAVOURS[flavour]
    module: ModuleType = import_extra(name, extra=extra, purpose=f"flavour {flavour}")
    if not hasattr(module, "Runtime"):  # type stubs alone make an empty `tensorrt` importable
        raise MissingExtraError(
            f"flavour {flavour} needs the package {name}, of which only type stubs are installed: "
            f"{how_to_install(extra)}"
        )
    return module


def sm_name(capability: str) -> str:
    """Write a compute capability such as "8.9" as NVIDIA's compilers and the names of files have it: "sm89"."""
    return "sm" + capability.replace(".", "")


def known_capabilities(module: ModuleType) -> list[str]:
    """List the compute capabilities that a TensorRT-RTX builds for, as "8.6", in order."""
    names = [name[2:] for name in module.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"{name[:-1]}.{name[-1]}" for name in names]


def capability_obstacle(
    flavour: str, module: ModuleType | None, compute_capabilities: Sequence[str], here: str
) -> str | None:
    """Say why a plan does not run on a GPU of compute capability ``here``; None where it does.

    One that names no ``compute_capabilities`` is portable. TensorRT-RTX's are so over the GPUs that it knows and those
    after them, and not over what lies between: Hopper and the Blackwell of data centres. ``module`` is None where the
    flavour is not installed, so that nobody can say what it knows.
    """
    needs = " or ".join(compute_capabilities)
    runs = here in compute_capabilities
    if not compute_capabilities:
        needs, runs = f"{PORTABLE_FROM} or later", float(here) >= float(PORTABLE_FROM)
        if flavour == "tensorrt-rtx" and module is not None:
            known = [each for each in known_capabilities(module) if float(each) >= float(PORTABLE_FROM)]
            needs, runs = f"{' or '.join(known)} or later than that", here in known or float(here) > float(known[-1])
    return None if runs else f"needs compute capability {needs}; this GPU has {here}"
