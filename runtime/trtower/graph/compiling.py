"""Compile a module with torch.compile for certain batches, with all that its compilers write in one folder."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import torch
from torch import fx

Forward = Callable[[torch.Tensor], torch.Tensor]

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variables that say where the compilers write -> a folder's name."""

MODES = {"cuda": "max-autotune-no-cudagraphs", "cpu": "default"}
"""How hard to search for fast kernels. CUDA graphs are captured outside."""

_TURN = threading.Lock()
"""Where compilers write is a setting of the process, so one thread at a time compiles."""


def why_not(device: torch.device) -> str | None:
    """Say what torch.compile lacks on this machine; None if nothing."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "compile=True does nothing in this process, because TORCHDYNAMO_DISABLE is 1: unset it"
    if device.type == "cuda" and find_spec("triton") is None:
        return (
            "compile=True on CUDA needs the package triton, which comes with PyTorch's CUDA builds: pip install triton"
        )
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        return f"compile=True needs a C++ compiler, and {compiler} is not installed: install it, or name one in CXX"
    return None


@contextmanager
def compilers_write_to(folder: Path) -> Iterator[None]:
    """Make the compilers read and write their results in a folder, for as long as the block lasts."""
    with _TURN:
        before = {variable: os.environ.get(variable) for variable in CACHES}
        os.environ.update({variable: str(folder / name) for variable, name in CACHES.items()})
        try:
            yield
        finally:
            for variable, value in before.items():
                if value is None:
                    del os.environ[variable]
                else:
                    os.environ[variable] = value


def compile_for(module: fx.GraphModule, images: torch.Tensor) -> Forward:
    """Compile a module for images of one shape, and run it once: (B, 3, S, S) -> (B, P + N, D).

    Call the result with such images only, and in the same state of autocast, gradients and inference mode; otherwise it
    compiles again.
    """
    # A copy has code of its own, for which torch.compile counts shapes.
    copied = fx.GraphModule(module, module.graph)
    compiled: Forward = torch.compile(copied, dynamic=False, mode=MODES[images.device.type])
    compiled(images)
    return compiled


def pack(folder: Path) -> bytes:
    """Return all files in a folder as one archive."""
    content = BytesIO()
    with ZipFile(content, "w", ZIP_DEFLATED) as archive:
        for name in list_files(folder):
            archive.write(folder / name, name)
    return content.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Unpack an archive of `pack` into a folder. zipfile itself keeps names inside of it."""
    with ZipFile(BytesIO(content)) as archive:
        archive.extractall(folder)


def list_files(folder: Path) -> list[str]:
    """List the files in a folder and below, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
