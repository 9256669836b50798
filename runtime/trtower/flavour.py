"""The two TensorRTs behind one name: data-centre `tensorrt` and `tensorrt-rtx`.

Their Python modules have the same names inside, so all code here takes the module as a parameter.
"""

from typing import TYPE_CHECKING

from trtower.errors import ConfigError, MissingExtraError
from trtower.extras import import_extra

if TYPE_CHECKING:
    from types import ModuleType

FLAVOURS = {"tensorrt": ("tensorrt", "trt"), "tensorrt-rtx": ("tensorrt_rtx", "trt-rtx")}
"""Flavour -> its Python module, and the extra of trtower that brings it."""


def load_flavour(flavour: str) -> "ModuleType":
    """Import a flavour's module; raise MissingExtraError where it is not installed."""
    if flavour not in FLAVOURS:
        raise ConfigError(f"flavour {flavour!r} is unknown: {' and '.join(FLAVOURS)} are known.")
    name, extra = FLAVOURS[flavour]
    module: ModuleType = import_extra(name, extra=extra, purpose=f"flavour {flavour}")
    if not hasattr(module, "Runtime"):  # type stubs alone make an empty `tensorrt` importable
        raise MissingExtraError(
            f"flavour {flavour} needs the package {name}, of which only type stubs are installed: "
            f"pip install 'trtower[{extra}]'"
        )
    return module
