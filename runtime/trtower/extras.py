"""Import an optional package, or say which extra provides it and how to install that extra."""

import importlib
import json
import os
import re
import shlex
import traceback
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from trtower.errors import BrokenExtraError, MissingExtraError, one_line

ENVIRONMENT = {"onnxruntime": {"ORT_DISABLE_TELEMETRY": "1"}, "ray.data": {"RAY_DATA_USAGE_DISABLED": "1"}}
"""Module -> environment variables to set before its import, unless the user has set them.

With telemetry ONNX Runtime stores an identifier in the user's cache, and prints a warning if it cannot. Ray Data's
statistics of its use come from a thread that goes on after Ray was shut down.
"""


def import_extra(module: str, *, extra: str, purpose: str) -> Any:
    """Import ``module``; raise MissingExtraError if its package is not installed, BrokenExtraError if it fails to load.

    Both messages say how to install ``extra``: a broken package mostly disagrees with another in its environment.
    """
    for variable, value in ENVIRONMENT.get(module, {}).items():
        os.environ.setdefault(variable, value)
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except Exception as err:
        if isinstance(err, ModuleNotFoundError) and find_spec(package) is None:
            raise MissingExtraError(
                f"{purpose} needs the package {package}, which is not installed: {how_to_install(extra)}"
            ) from err
        remedy = f"{_remedy(package, err)}, or use a separate environment for {purpose}"
        if isinstance(err, ModuleNotFoundError):  # another package, as ray.serve needs many, or a part of this one
            remedy = f"install all that {purpose} needs, here or in a separate environment"
        raise BrokenExtraError(f"{_fault(package, err)}: {remedy}: {how_to_install(extra)}") from err


def how_to_install(extra: str) -> str:
    """Return the pip command that adds ``extra``, from the clone, repository or index that trtower came from.

    Pass several extras as one comma-separated string. The command is quoted for a shell.
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
        origin, url = {}, ""  # the folder was removed after the install, as in a container
    if "vcs_info" in origin:
        revision = origin["vcs_info"].get("requested_revision")
        url = f"{origin['vcs_info']['vcs']}+{url}{f'@{revision}' if revision else ''}"
    if origin.get("subdirectory"):
        url += f"#subdirectory={origin['subdirectory']}"
    return f"pip install {shlex.quote(f'{name} @ {url}' if url else name)}"


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, without importing it; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def extra_of(module: str) -> str | None:
    """Return the extra that requires the package of ``module``, by trtower's metadata; None if there is none."""
    try:
        lines = requires("trtower") or []
    except PackageNotFoundError:
        return None
    name = module.partition(".")[0].replace("_", "-")
    pattern = re.compile(rf"{re.escape(name)}\b(?!-).*extra == ['\"]([\w-]+)['\"]", flags=re.IGNORECASE)
    return next((match[1] for match in map(pattern.match, lines) if match), None)


def why_broken(err: BaseException) -> str | None:
    """Say which installed package broke during import, and what to do; None if ``err`` has another origin.

    An error comes from an import if a package's module body is on its traceback, or on that of its cause.
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
    return f"{_fault(package, err)}: {_remedy(package, err)}, or install trtower in a separate environment"


def _fault(package: str, err: BaseException) -> str:
    """Say that an installed package fails to import, and why."""
    distributions = set(packages_distributions().get(package, ()))  # a namespace, such as google, has several
    number = f" {version(*distributions)}" if len(distributions) == 1 else ""
    return f"the installed {package}{number} fails to import ({type(err).__name__}: {one_line(err)})"


def _remedy(package: str, err: BaseException) -> str:
    if package == "typer" and "pydantic" in str(err):
        return "pip install 'typer<0.29', which does not need pydantic 2"
    return f"reinstall {package}"
