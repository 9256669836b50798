"""Import an optional package, or say which extra brings it and how to install that from where trtower came from."""

import importlib
import json
import re
import shlex
import traceback
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from trtower.errors import MissingExtraError


def import_extra(module: str, *, extra: str, purpose: str) -> Any:
    """Import ``module``; raise MissingExtraError naming ``extra`` where its package is not installed.

    Only the absence of the package itself is translated: an installed package that breaks
    while it is imported raises its own error, because installing it again would not help.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        package = module.partition(".")[0]
        if err.name is None or err.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {package}, which is not installed: {how_to_install(extra)}"
        ) from err


def how_to_install(extra: str) -> str:
    """Return the pip command that adds ``extra``, from the clone, repository or index that trtower came from.

    Several extras are one string, joined by commas. The command is quoted for a shell.
    """
    name = f"trtower[{extra}]"
    try:  # pip wrote this when it installed trtower
        origin = json.loads(distribution("trtower").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    url = origin.get("url", "")
    if "dir_info" in origin:
        folder = url2pathname(urlsplit(url).path)
        editable = "-e " if origin["dir_info"].get("editable") else ""
        if Path(folder).is_dir():
            return f"pip install {editable}{shlex.quote(f'{folder}[{extra}]')}"
        origin, url = {}, ""  # built from a folder that is gone, as in a container
    if "vcs_info" in origin:
        revision = origin["vcs_info"].get("requested_revision")
        url = f"{origin['vcs_info']['vcs']}+{url}{f'@{revision}' if revision else ''}"
    if origin.get("subdirectory"):
        url += f"#subdirectory={origin['subdirectory']}"
    return f"pip install {shlex.quote(f'{name} @ {url}' if url else name)}"


def extra_of(module: str) -> str | None:
    """Find the extra whose requirements have a module's name, by trtower's own metadata."""
    try:
        lines = requires("trtower") or []
    except PackageNotFoundError:
        return None
    name = module.partition(".")[0].replace("_", "-")
    wanted = re.compile(rf"{re.escape(name)}\b(?!-).*extra == ['\"]([\w-]+)['\"]", flags=re.IGNORECASE)
    return next((match[1] for match in map(wanted.match, lines) if match), None)


def why_broken(err: BaseException) -> str | None:
    """Say which installed package broke while it was imported, and what to do; None if ``err`` is of another kind.

    An exception comes from an import if a module body of that package is on its traceback, or on its cause's.
    """
    names = [
        str(frame.f_globals.get("__name__", "")).partition(".")[0]
        for frame, _ in traceback.walk_tb(err.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    installed = packages_distributions()
    package = next((name for name in names if name in installed and not name.startswith("trtower")), None)
    if package is None:
        return why_broken(err.__cause__) if err.__cause__ else None
    reason = f"{type(err).__name__}: {err}"
    remedy = f"install {package} again"
    if package == "typer" and "pydantic" in reason:
        remedy = "pip install 'typer<0.29', which does not need pydantic 2"
    return (
        f"the installed {package} {version(installed[package][0])} breaks when it is imported ({reason}): "
        f"{remedy}, or install trtower and its command in an environment of their own"
    )
