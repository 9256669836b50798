"""Keep the kernels that TensorRT-RTX compiled in one process for the next.

TensorRT-RTX itself rejects what does not match the driver.
"""

import logging
from pathlib import Path
from typing import Any

from trtower.runners.kept import Kept

logger = logging.getLogger(__name__)

LOST = "compiled kernels are not saved for the next process"


class RuntimeCache:
    """The cache of one plan on one GPU."""

    def __init__(self, bundle: Path, plan_sha256: str, version: str, gpu: str) -> None:
        self._kept = Kept(
            bundle=bundle,
            kind="runtime-cache",
            source_sha256=plan_sha256,
            compiler="TensorRT-RTX",
            version=version,
            device=gpu,
            again="its kernels are compiled again",
            lost=LOST,
        )
        self._handle: Any = None

    def read_into(self, handle: Any) -> Any:
        """Fill TensorRT-RTX's ``handle`` with what an earlier process saved, and return it."""
        self._handle = handle
        self._kept.read(self._deserialize)
        return handle

    def _deserialize(self, content: bytes) -> str | None:
        if self._handle.deserialize(content):
            return None
        return "TensorRT-RTX rejects it, probably because the driver has changed"

    def write(self) -> None:
        """Save what was compiled so far, in place of what was saved before."""
        serialised = self._handle.serialize()
        if serialised is None:
            logger.warning("%s: TensorRT-RTX returned none", LOST)
            return
        self._kept.write(bytes(memoryview(serialised)))
