"""The tower that a bundle took the place of: its weights out of memory, and exactly as they were back again.

They are written to a file without a name, which vanishes with the process however that ends. The checkpoint is no
substitute: its weights may have been changed, cast or merged since they were loaded, and it may not be there any more.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from trtower.errors import ConfigError


class Original:
    """A replaced tower (``module``), which keeps its weights until `drop`."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._dtype: torch.dtype = module.dtype
        self._file: IO[bytes] | None = None
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []

    def write(self, folder: Path | None) -> None:
        """Write the weights into a file in ``folder``, by default where temporary files go.

        Raises ConfigError where they cannot be written; nothing is left behind then.
        """
        where = folder or Path(tempfile.gettempdir())
        try:
            file = tempfile.TemporaryFile(dir=where)  # noqa: SIM115 - kept open
            for parameter in self.module.parameters():
                file.write(_bytes_of(parameter.detach().to("cpu").contiguous()))
                self._shapes.append((parameter.shape, parameter.dtype))
            file.flush()
        except OSError as err:
            raise ConfigError(
                f"the tower's own weights could not be written to {where} ({err.strerror}), from where they would be "
                "brought back: name another with offload_folder=, or keep them in memory with keep_original=True."
            ) from err
        self._file = file

    def drop(self) -> int:
        """Let go of the weights, which `write` has written; give the bytes that they took."""
        freed = 0
        for parameter in self.module.parameters():
            freed += parameter.nbytes
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        return freed

    def bring_back(self, device: torch.device, dtype: torch.dtype) -> None:
        """Have the weights in the module again, where and in which dtype its stand-in was last."""
        if self._file is not None:
            for parameter, weight in zip(self.module.parameters(), list(self._read()), strict=True):
                parameter.data = weight.to(device)
            self._file.close()
            self._file = None
        self.module.to(device)
        if dtype != self._dtype:
            self.module.to(dtype)

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Give the state dict of the module, on the CPU where its weights are out of memory."""
        state: dict[str, Tensor] = self.module.state_dict(keep_vars=True)
        if self._file is not None:
            read = {
                id(parameter): weight for parameter, weight in zip(self.module.parameters(), self._read(), strict=True)
            }
            state = {name: read.get(id(tensor), tensor) for name, tensor in state.items()}
        cast = dtype if dtype != self._dtype else None
        return {
            name: tensor.detach().to(cast if tensor.is_floating_point() else None) for name, tensor in state.items()
        }

    def _read(self) -> Iterator[Tensor]:
        assert self._file is not None  # noqa: S101 - narrows the type
        self._file.seek(0)
        for shape, dtype in self._shapes:
            tensor = torch.empty(shape, dtype=dtype)
            if self._file.readinto(_bytes_of(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"the weights of {type(self.module).__name__} cannot be read back: the file is short."
                )
            yield tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    """Give the memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view
