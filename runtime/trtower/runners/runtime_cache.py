"""Keep the kernels that TensorRT-RTX compiled in one process for the next, in a file beside the bundle.

The file's name says which plan, version and GPU it is for, and the start of its own sha256: what was cut short is found
before TensorRT sees it, and TensorRT itself refuses what its driver does not match.
"""

import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DIGITS = 16
"""Of a sha256, in a file's name."""


class RuntimeCache:
    """The cache of one plan on one GPU. What is wrong with it costs time and never an answer, so it is only said."""

    def __init__(self, bundle: Path, plan_sha256: str, version: str, gpu: str) -> None:
        bundle = bundle.resolve()
        self._folder = bundle.parent / f".{bundle.name}.runtime-cache"
        self._plan, self._own = plan_sha256[:DIGITS], f"{plan_sha256[:DIGITS]}.{version}.{gpu}."
        self._gpu = gpu
        self._handle: Any = None

    def read_into(self, handle: Any) -> Any:
        """Fill TensorRT's ``handle`` with what the process before has kept, and give it."""
        self._handle = handle
        for path in sorted(self._folder.glob(f"{self._plan}.*.{self._gpu}.*.cache")):
            why = self._read(path)
            if why:
                logger.warning("%s is thrown away, and kernels are compiled again: %s", path, why)
                _remove(path)
        return handle

    def _read(self, path: Path) -> str | None:
        """Read one file; say why it is of no use."""
        if not path.name.startswith(self._own):
            return "it is of another version of TensorRT-RTX"
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # another process has put a newer one in its place
            return None
        except OSError as err:
            return f"it cannot be read: {err.strerror}"
        if hashlib.sha256(content).hexdigest()[:DIGITS] != path.name.removeprefix(self._own).removesuffix(".cache"):
            return "it was cut short or altered"
        if not self._handle.deserialize(content):
            return "TensorRT-RTX does not take it: the driver is another one"
        return None

    def write(self) -> None:
        """Keep what was compiled so far, in the place of what was kept before."""
        serialised = self._handle.serialize()
        if serialised is None:
            logger.warning("compiled kernels are not kept for the next process: TensorRT-RTX gives none")
            return
        content = bytes(memoryview(serialised))
        name = f"{self._own}{hashlib.sha256(content).hexdigest()[:DIGITS]}.cache"
        if (self._folder / name).exists():
            return
        staged = self._folder / f"{name}.{os.getpid()}.{threading.get_ident()}.staging"
        try:
            self._folder.mkdir(exist_ok=True)
            try:
                staged.write_bytes(content)
                staged.replace(self._folder / name)
            finally:
                _remove(staged)
        except OSError as err:
            logger.warning("compiled kernels are not kept for the next process: %s: %s", self._folder, err.strerror)
            return
        for older in self._folder.glob(f"{self._own}*.cache"):
            if older.name != name:
                _remove(older)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as err:
        logger.warning("%s could not be removed: %s", path, err.strerror)
