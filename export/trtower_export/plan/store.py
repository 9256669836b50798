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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from trtower.bundle.staging import describe, disk_errors
from trtower.errors import BuildError
from trtower.extras import import_extra
from trtower_export.console import Progress

PLAN, LOG, ENTRY = "plan", "log", "entry.json"

Build = Callable[[Path], tuple[Path, Path]]
"""Builds a plan under a folder; gives where it and its log lie."""


def default_store() -> Path:
    """Give the store of this user."""
    platformdirs = import_extra("platformdirs", extra="cli", purpose="the store of plans")
    path: Path = platformdirs.user_cache_path("trtower") / "plans"
    return path


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A plan in the store, and the log of its build."""

    plan: Path
    log: Path

    def copy_to(self, plan: Path, log: Path) -> None:
        """Put copies of both where a bundle wants them."""
        for source, target in ((self.plan, plan), (self.log, log)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


class PlanStore:
    """A folder of plans."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def obtain(self, facts: Mapping[str, Any], build: Build, progress: Progress) -> Stored:
        """Give the plan of which all ``facts`` are true: the one that is there, or built now. Raises BuildError."""
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        place = self.folder / key
        lock = FileLock(self.folder / f"{key}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = lock.acquire(timeout=0)
        except Timeout:
            progress.say(f"another process builds this very plan: waiting for it ({place})")
            held = lock.acquire()
        except OSError as err:
            raise BuildError(
                f"{self.folder} keeps plans that were built, and cannot be written: {err.strerror}. Build with "
                "--no-store, or mend it."
            ) from err
        with held:
            return self._read(place, progress) or self._build(place, build)

    def _read(self, place: Path, progress: Progress) -> Stored | None:
        """Read what was built before, if it is what was written then."""
        if not place.exists():
            return None
        stored = Stored(plan=place / PLAN, log=place / LOG)
        try:
            written = json.loads((place / ENTRY).read_text(encoding="utf-8"))
            intact = [written[PLAN], written[LOG]] == _describe(stored)
        except (OSError, ValueError, LookupError, TypeError):
            intact = False
        if not intact:
            progress.say(f"{place} was cut short or altered: it is thrown away, and the plan is built again")
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            return None
        progress.say(f"the plan was built here on {written['date']} already: {place}")
        return stored

    def _build(self, place: Path, build: Build) -> Stored:
        staging = place.with_suffix(".staging")
        shutil.rmtree(staging, ignore_errors=True)  # of a build that was killed
        with disk_errors(staging):
            try:
                staging.mkdir()
                staged = Stored(plan=staging / PLAN, log=staging / LOG)
                with TemporaryDirectory(dir=staging) as folder:
                    plan, log = build(Path(folder))
                    plan.replace(staged.plan)
                    log.replace(staged.log)
                date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
                written = dict(zip((PLAN, LOG), _describe(staged), strict=True)) | {"date": date}
                (staging / ENTRY).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
                staging.rename(place)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return Stored(plan=place / PLAN, log=place / LOG)


def _describe(stored: Stored) -> list[dict[str, Any]]:
    return [dataclasses.asdict(describe(path)) for path in (stored.plan, stored.log)]
