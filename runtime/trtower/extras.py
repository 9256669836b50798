"""Import an optional package, or say which extra brings it."""

import importlib
import re
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from trtower.errors import MissingExtraError


def import_extra(module: str, *, extra: str, purpose: str) -> Any:
    """Import ``module``; raise MissingExtraError naming ``extra`` where its package is not installed.

    Only the absence of the package itself is translated: an installed package that breaks
    while it is imported raises its own error, because installing it again would not help.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name is None or err.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {err.name}, which is not installed: pip install 'trtower[{extra}]'"
        ) from err


def extra_of(module: str) -> str | None:
    """Find the extra whose requirements have a module's name, by trtower's own metadata."""
    try:
        lines = requires("trtower") or []
    except PackageNotFoundError:
        return None
    name = module.partition(".")[0].replace("_", "-")
    for line in lines:
        match = re.match(rf"{re.escape(name)}\b(?!-).*extra == ['\"]([\w-]+)['\"]", line, flags=re.IGNORECASE)
        if match:
            return match.group(1)
    return None
