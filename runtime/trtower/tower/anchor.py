"""One empty parameter, from which model code reads the device and dtype of a module that has no weights.

It hangs in a module of its own, which is never called: before a call accelerate brings back what it has offloaded, from
the model's state dict, where an anchor is not. And it is never on the meta device, where accelerate puts what it
offloads and what it makes without memory: nothing could be copied from there.
"""

from typing import Any

import torch
from torch import nn


class _OnDevices(dict[str, Any]):
    """The parameters of a module, which stay where they are when they are put on the meta device."""

    def __setitem__(self, name: str, parameter: Any) -> None:
        if parameter is None or not parameter.is_meta:
            super().__setitem__(name, parameter)


class Anchor(nn.Module):
    """Holds the parameter ``empty``; it is neither saved nor loaded."""

    empty: nn.Parameter

    def __init__(self, dtype: torch.dtype, device: torch.device, *, requires_grad: bool = False) -> None:
        super().__init__()
        self._parameters = _OnDevices()
        self._register(dtype, device, requires_grad=requires_grad)

    def place(self, device: torch.device) -> None:
        """Make the parameter anew on a device."""
        self._register(self.empty.dtype, device, requires_grad=self.empty.requires_grad)

    @torch.inference_mode(mode=False)
    def _register(self, dtype: torch.dtype, device: torch.device, *, requires_grad: bool) -> None:
        self._parameters["empty"] = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing, and miss nothing."""
