"""Build each plan only once on a machine: keep it for the same graph, TensorRT, target and settings.

The store is keyed by content, so the name of a bundle does not matter. While a process builds a plan, a lock makes
others wait for it; if that process dies, the system releases the lock. A stored plan is compared with its sha256 before
use. Bundles get copies, because damage to a shared file would spread to all of them.
"""

import dataclasses
import datetime
import errno
import hashlib
import json
import os
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
"""A function that builds PLAN and LOG in a folder."""


def default_store() -> Path:
    """Return the folder of this user's store."""
    platformdirs = import_extra("platformdirs", extra="cli", purpose="the store of plans")
    path: Path = platformdirs.user_cache_path("trtower") / "plans"
    return path


def find_store(progress: Progress) -> Path | None:
    """Return the user's store of plans, or None if it cannot be written: it only saves the time of a build."""
    store = default_store()
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        reason = err.strerror
    else:
        if os.access(store, os.W_OK):
            return store
        reason = os.strerror(errno.EACCES)
    progress.say(f"plans are not kept for reuse: {store}: {reason}")
    return None


def fetch_or_build(store: Path, facts: Mapping[str, Any], build: Build, progress: Progress) -> Path:
    """Return the store's folder of the plan that ``facts`` describe, and build the plan first if it is missing.

    Raises BuildError if the store cannot be written, and whatever ``build`` raises.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    place = store / key
    lock = FileLock(store / f"{key}.lock")
    try:
        store.mkdir(parents=True, exist_ok=True)
        held = lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"another process is building this plan: waiting for it ({place})")
        held = lock.acquire()
    except OSError as err:
        raise BuildError(
            f"the store of plans {store} cannot be written: {err.strerror}. Build with --no-store, or make it writable."
        ) from err
    with held:
        if not _is_intact(place, progress):
            _fill(place, build)
    return place


def _is_intact(place: Path, progress: Progress) -> bool:
    """Return whether the store holds the plan as it was written; delete anything else in its place."""
    if not place.exists():
        return False
    try:
        written = json.loads((place / ENTRY).read_text(encoding="utf-8"))
        if {PLAN: written[PLAN], LOG: written[LOG]} == _describe(place):
            progress.say(f"reusing the plan that was built here on {written['date']}: {place}")
            return True
    except (OSError, ValueError, LookupError, TypeError):
        pass  # an unreadable entry is treated like an altered one
    progress.say(f"{place} is incomplete or altered: it is deleted, and the plan is built again")
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    return False


def _fill(place: Path, build: Build) -> None:
    staging = place.with_suffix(".staging")
    shutil.rmtree(staging, ignore_errors=True)  # left by a build that was killed
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
