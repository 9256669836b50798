"""One empty parameter, from which model code reads the device and dtype of a module that has no weights.

It hangs in a module of its own, which is never called. accelerate moves what it offloads to the meta device, and brings
it back before a call from the model's state dict, where an anchor is not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Anchor(nn.Module):
    """Holds the parameter ``empty``; it is neither saved nor loaded."""

    empty: nn.Parameter

    def __init__(self, dtype: torch.dtype, device: torch.device, *, requires_grad: bool = False) -> None:
        super().__init__()
        self._register(dtype, device, requires_grad=requires_grad)

    def place(self, device: torch.device) -> None:
        """Make the parameter anew on a device: nothing can be copied from the meta device, where it may be now."""
        self._register(self.empty.dtype, device, requires_grad=self.empty.requires_grad)

    def _register(self, dtype: torch.dtype, device: torch.device, *, requires_grad: bool) -> None:
        """Register the parameter past `register_parameter`.

        accelerate's `init_empty_weights` replaces that with one that puts every parameter on the meta device.
        """
        self._parameters["empty"] = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Anchor":
        """Follow a move or a cast of the module around it, from the meta device too."""
        empty = self.empty
        start = torch.device("cpu") if empty.is_meta else empty.device
        moved = fn(torch.empty(0, dtype=empty.dtype, device=start))
        if (moved.dtype, moved.device) != (empty.dtype, empty.device):
            self._register(moved.dtype, moved.device, requires_grad=empty.requires_grad)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing, and miss nothing."""
