"""Import a package's public names on first use, so that `import trtower` does not import torch."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def import_lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__``.

    ``homes`` maps each module, relative to the package, to its public names, separated by spaces. The first use of a
    name raises MissingExtraError if its module needs a package of an extra that is not installed, and BrokenExtraError
    if such a package is installed and fails to import.
    """
    module_of = {name: module for module, names in homes.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        except Exception as err:
            from trtower.errors import BrokenExtraError, MissingExtraError, TrtowerError
            from trtower.extras import extra_of, how_to_install, why_broken  # four times as slow as `import trtower`

            if isinstance(err, TrtowerError):
                raise
            if isinstance(err, ModuleNotFoundError) and err.name and (extra := extra_of(err.name)):
                raise MissingExtraError(
                    f"{package}.{name} needs the package {err.name}, which is not installed: {how_to_install(extra)}"
                ) from err
            if broken := why_broken(err):
                raise BrokenExtraError(broken) from err
            raise
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *module_of})
