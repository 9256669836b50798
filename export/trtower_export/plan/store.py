"""Build a plan once on a machine: the same graph, TensorRT, target and settings give the plan that is there already.

The store is keyed on content and knows no bundle's name. A lock, which the system drops with the process that holds it,
has others wait for a plan that is being built, and take it. What is in the store is compared with its sha256 before it
is given out, and copied: a bundle that shared its files with others could be damaged through them.
"""

import dataclasses
import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trtower.bundle.staging import describe, disk_errors
from trtower.errors import BuildError
from trtower.extras import import_extra
from trtower_export.console import Progress
from trtower_export.plan.polygraphy import LOG, PLAN

ENTRY = "entry.json"

Build = Callable[[Path], None]
"""Builds PLAN and LOG in a folder."""


def default_store() -> Path:
    """Return the store of this user."""
    platformdirs = import_extra("platformdirs", extra="cli", purpose="the store of plans")
    path: Path = platformdirs.user_cache_path("trtower") / "plans"
    return path


def fetch_or_build(store: Path, facts: Mapping[str, Any], build: Build, progress: Progress) -> Path:
    """Return the folder of the plan of which all ``facts`` are true, which is in the store or is built now.

    Raises BuildError if the store cannot be written, and whatever ``build`` raises.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    place = store / key
    lock = FileLock(store / f"{key}.lock")
    try:
        store.mkdir(parents=True, exist_ok=True)
        held = lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"another process builds this very plan: waiting for it ({place})")
        held = lock.acquire()
    except OSError as err:
        raise BuildError(
            f"{store} keeps plans that were built, and cannot be written: {err.strerror}. Build with --no-store, or "
            "mend it."
        ) from err
    with held:
        if not _is_intact(place, progress):
            _fill(place, build)
    return place


def _is_intact(place: Path, progress: Progress) -> bool:
    """Whether a plan is in the store as it was written; if it is not, what is there is thrown away."""
    if not place.exists():
        return False
    try:
        written = json.loads((place / ENTRY).read_text(encoding="utf-8"))
        if {PLAN: written[PLAN], LOG: written[LOG]} == _describe(place):
            progress.say(f"the plan was built here on {written['date']} already: {place}")
            return True
    except (OSError, ValueError, LookupError, TypeError):
        pass  # it is no more intact than one that was altered
    progress.say(f"{place} was cut short or altered: it is thrown away, and the plan is built again")
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    return False


def _fill(place: Path, build: Build) -> None:
    staging = place.with_suffix(".staging")
    shutil.rmtree(staging, ignore_errors=True)  # of a build that was killed
    with disk_errors(staging):
        try:
            staging.mkdir()
            build(staging)
            date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            written = _describe(staging) | {"date": date}
            (staging / ENTRY).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            staging.rename(place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _describe(folder: Path) -> dict[str, Any]:
    return {name: dataclasses.asdict(describe(folder / name)) for name in (PLAN, LOG)}
