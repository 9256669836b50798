"""One empty parameter that tells model code the device and dtype of a module without weights.

It sits in a separate module that is never called. Before a module is called, accelerate restores its offloaded
parameters from the model's state dict, which does not contain the anchor. And it is never on the meta device, where
accelerate puts what it offloads or makes without memory: nothing could be copied from there.
"""

from typing import Any

import torch
from torch import nn


class _OnDevices(dict[str, Any]):
    """The parameters of a module; each stays where it is when something moves it to the meta device."""

    def __setitem__(self, name: str, parameter: Any) -> None:
        if parameter is None or not parameter.is_meta:
            super().__setitem__(name, parameter)


class Anchor(nn.Module):
    """Holds the parameter ``empty``, which is neither saved nor loaded."""

    empty: nn.Parameter

    def __init__(self, dtype: torch.dtype, device: torch.device, *, requires_grad: bool = False) -> None:
        super().__init__()
        self._parameters = _OnDevices()
        self._register(dtype, device, requires_grad=requires_grad)

    def place(self, device: torch.device) -> None:
        """Recreate the parameter on a device."""
        self._register(self.empty.dtype, device, requires_grad=self.empty.requires_grad)

    @torch.inference_mode(mode=False)
    def _register(self, dtype: torch.dtype, device: torch.device, *, requires_grad: bool) -> None:
        self._parameters["empty"] = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing, and report nothing as missing."""
