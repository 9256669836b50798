"""Keep what one process compiled for the next, in files beside the bundle.

A file's name holds the start of the sha256 of what was compiled, the version of the compiler, the device, and the start
of the sha256 of the file's own content. So a file that is incomplete, or that another version wrote, is found before
anything reads it. Such faults cost time but never change a result, so they are only logged.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

DIGITS = 16
"""How many digits of a sha256 a file's name has."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The file of one compiler and device for one part of a bundle.

    Attributes:
        bundle: The bundle's folder.
        kind: What the hidden folder beside it is called, such as "runtime-cache".
        source_sha256: What was compiled.
        compiler: Who compiles, in words.
        version: Its version.
        device: What it compiles for, such as the GPU, as one word without dots.
        again: What happens without the file, as a clause.
        lost: What the next process lacks if the file cannot be written, as a clause.
        alone: Whether nothing else of the bundle is kept there, so that what was compiled from something else is stale.
    """

    bundle: Path
    kind: str
    source_sha256: str
    compiler: str
    version: str
    device: str
    again: str
    lost: str
    alone: bool = False

    @property
    def folder(self) -> Path:
        """The hidden folder beside the bundle."""
        bundle = self.bundle.resolve()
        return bundle.parent / f".{bundle.name}.{self.kind}"

    @property
    def _own(self) -> str:
        return f"{self.source_sha256[:DIGITS]}.{self.version}.{self.device}."

    def read(self, use: Callable[[bytes], str | None]) -> bool:
        """Hand what an earlier process wrote to ``use``, which returns why it is unusable, or None.

        Files that are unusable are removed, with a warning. Returns whether one was used.
        """
        used = False
        source = "*" if self.alone else self.source_sha256[:DIGITS]
        for path in sorted(self.folder.glob(f"{source}.*.{self.device}.*.cache")):
            try:
                why = self._read(path, use)
            except FileNotFoundError:  # another process has replaced it with a newer one
                continue
            if why:
                logger.warning("%s is discarded, and %s: %s", path, self.again, why)
                _remove(path)
            used = used or not why
        return used

    def _read(self, path: Path, use: Callable[[bytes], str | None]) -> str | None:
        if not path.name.startswith(self.source_sha256[:DIGITS]):
            return "it was compiled from another export of the bundle"
        if not path.name.startswith(self._own):
            return f"another version of {self.compiler} wrote it"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as err:
            return f"it cannot be read: {err.strerror}"
        if hashlib.sha256(content).hexdigest()[:DIGITS] != path.name.removeprefix(self._own).removesuffix(".cache"):
            return "it is incomplete or was altered"
        return use(content)

    def write(self, content: bytes) -> None:
        """Write a file in place of what was written before."""
        name = f"{self._own}{hashlib.sha256(content).hexdigest()[:DIGITS]}.cache"
        if (self.folder / name).exists():
            return
        staged = self.folder / f"{name}.{os.getpid()}.{threading.get_ident()}.staging"
        try:
            self.folder.mkdir(exist_ok=True)
            try:
                staged.write_bytes(content)
                staged.replace(self.folder / name)
            finally:
                _remove(staged)
        except OSError as err:
            logger.warning(
                "%s: %s: %s. Make the folder writable, with room in it, or pass EngineOptions(runtime_cache=False).",
                self.lost,
                self.folder,
                err.strerror,
            )
            return
        for older in self.folder.glob(f"{self._own}*.cache"):
            if older.name != name:
                _remove(older)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as err:
        logger.warning("could not remove %s: %s", path, err.strerror)
