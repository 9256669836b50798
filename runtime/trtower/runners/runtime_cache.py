"""Keep the kernels that TensorRT-RTX compiled in one process for the next, in a file beside the bundle.

The file's name holds the start of the plan's sha256, the TensorRT-RTX version, the GPU, and the start of the sha256 of
the file's own content. So an incomplete file is found before TensorRT-RTX reads it. TensorRT-RTX itself rejects a file
that does not match the driver.
"""

import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DIGITS = 16
"""How many digits of a sha256 a file's name has."""


class RuntimeCache:
    """The cache of one plan on one GPU. Its faults cost time but never change a result, so they are only logged."""

    def __init__(self, bundle: Path, plan_sha256: str, version: str, gpu: str) -> None:
        bundle = bundle.resolve()
        self._folder = bundle.parent / f".{bundle.name}.runtime-cache"
        self._plan, self._own = plan_sha256[:DIGITS], f"{plan_sha256[:DIGITS]}.{version}.{gpu}."
        self._gpu = gpu
        self._handle: Any = None

    def read_into(self, handle: Any) -> Any:
        """Fill TensorRT-RTX's ``handle`` with what an earlier process saved, and return it."""
        self._handle = handle
        for path in sorted(self._folder.glob(f"{self._plan}.*.{self._gpu}.*.cache")):
            why = self._read(path)
            if why:
                logger.warning("%s is discarded, and its kernels are compiled again: %s", path, why)
                _remove(path)
        return handle

    def _read(self, path: Path) -> str | None:
        """Load one file into the handle; return why it is unusable, or None."""
        if not path.name.startswith(self._own):
            return "another version of TensorRT-RTX wrote it"
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # another process has replaced it with a newer one
            return None
        except OSError as err:
            return f"it cannot be read: {err.strerror}"
        if hashlib.sha256(content).hexdigest()[:DIGITS] != path.name.removeprefix(self._own).removesuffix(".cache"):
            return "it is incomplete or was altered"
        if not self._handle.deserialize(content):
            return "TensorRT-RTX rejects it, probably because the driver has changed"
        return None

    def write(self) -> None:
        """Save what was compiled so far, in place of what was saved before."""
        serialised = self._handle.serialize()
        if serialised is None:
            logger.warning("compiled kernels are not saved for the next process: TensorRT-RTX returned none")
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
            logger.warning(
                "compiled kernels are not saved for the next process: %s: %s. Make the folder writable, or pass "
                "EngineOptions(runtime_cache=False).",
                self._folder,
                err.strerror,
            )
            return
        for older in self._folder.glob(f"{self._own}*.cache"):
            if older.name != name:
                _remove(older)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as err:
        logger.warning("could not remove %s: %s", path, err.strerror)
