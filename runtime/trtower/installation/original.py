"""The tower that a bundle replaced: take its weights out of memory, and bring them back exactly as they were.

The weights are written to an unnamed file, which vanishes however the process ends. The checkpoint is no substitute:
the weights may have been changed, cast or merged since they were loaded, and the checkpoint may be gone.
"""

import ctypes
import os
import platform
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from trtower.errors import ConfigError


class Original:
    """A replaced tower (``module``), which keeps its weights until `drop`. Threads and forked processes may read it."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._dtype = main_dtype(module)
        self._trained, self._training = wants_gradient(module), module.training
        self._parameters: list[nn.Parameter] = list(module.parameters())
        self._left: list[nn.Parameter] = []  # what `drop` puts in their places, on the meta device
        self._file: IO[bytes] | None = None

    def write(self, folder: Path | None) -> None:
        """Write the weights to an unnamed file in ``folder``; None is the folder for temporary files.

        Raises ConfigError if they cannot be written, and leaves nothing behind.
        """
        where = folder or Path(tempfile.gettempdir())
        try:
            file = tempfile.TemporaryFile(dir=where)  # noqa: SIM115 - kept open
            weakref.finalize(self, _close, file)  # also if the model is dropped with the bundle in it
            for parameter in self._parameters:
                file.write(_bytes_of(parameter.detach().to("cpu").contiguous()))
            file.flush()
        except OSError as err:
            raise ConfigError(
                f"could not save the tower's own weights to {where} ({err.strerror}): choose another folder with "
                "offload_folder=, or keep them in memory with keep_original=True."
            ) from err
        self._file = file

    def drop(self) -> int:
        """Free the weights, which `write` has saved; return the bytes that they took.

        Other holders of the module find the weights on the meta device, where torch raises when they are used.
        """
        freed = sum(parameter.nbytes for parameter in self._parameters)
        self._left = [nn.Parameter(parameter.to("meta"), parameter.requires_grad) for parameter in self._parameters]
        self._exchange(self._parameters, self._left)
        for parameter in self._parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        return freed

    @torch.inference_mode(mode=False)
    def bring_back(self, anchor: Tensor, *, training: bool) -> nn.Module:
        """Return the module with its weights, on the device and in the dtype and mode of its stand-in."""
        if self._left:
            for parameter, weight in zip(self._parameters, list(self._read()), strict=True):
                parameter.data = weight.to(anchor.device)
            self._exchange(self._left, self._parameters)
            self._left = []
        if self._file is not None:
            self._file.close()
        module: nn.Module = self.module.to(anchor.device)
        if anchor.dtype != self._dtype and self._dtype is not None:
            module.to(anchor.dtype)
        if anchor.requires_grad != self._trained:
            module.requires_grad_(anchor.requires_grad)
        if training != self._training:
            module.train(training)
        return module

    @torch.inference_mode(mode=False)
    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the state dict of the module, cast to ``dtype``; on the CPU if the weights were dropped."""
        state: dict[str, Tensor] = self.module.state_dict(keep_vars=True)
        if self._left:
            read = {id(left): weight for left, weight in zip(self._left, self._read(), strict=True)}
            state = {name: read.get(id(tensor), tensor) for name, tensor in state.items()}
        cast = dtype if dtype != self._dtype else None
        return {
            name: tensor.detach().to(cast if tensor.is_floating_point() else None) for name, tensor in state.items()
        }

    def _exchange(self, before: list[nn.Parameter], after: list[nn.Parameter]) -> None:
        """Replace parameters of the module by others, in every place that holds them."""
        others = {id(each): other for each, other in zip(before, after, strict=True)}
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in others:
                    module._parameters[name] = others[id(parameter)]

    def _read(self) -> Iterator[Tensor]:
        """Read the weights, at explicit offsets: threads and forked processes share the file's position."""
        assert self._file is not None  # noqa: S101 - narrows the type
        offset = 0
        for left in self._left:
            tensor = torch.empty(left.shape, dtype=left.dtype, device="cpu")
            rest = _bytes_of(tensor)
            while rest:
                count = os.preadv(self._file.fileno(), [rest], offset)
                if not count:
                    raise ConfigError(
                        f"the weights of this {type(self.module).__name__} cannot be read back: load the model again."
                    )
                rest, offset = rest[count:], offset + count
            yield tensor


def give_memory_back(device: torch.device) -> None:
    """Return free memory: torch's cache to the GPU, where TensorRT needs it, and the heap to the system.

    glibc keeps freed blocks of up to 32 MiB in its heap, and a tower's matrices are such blocks.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def main_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of most of a module's weights; None if it has none. Models in BF16 may keep some in FP32."""
    weights = Counter[torch.dtype]()
    for parameter in module.parameters():
        weights[parameter.dtype] += parameter.numel()
    return max(weights, key=lambda dtype: weights[dtype]) if weights else None


def wants_gradient(module: nn.Module) -> bool:
    """Whether any weight of a tower requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _close(file: IO[bytes]) -> None:
    """Close a file that nobody reads any more, even on a full disk."""
    with suppress(OSError):
        file.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
