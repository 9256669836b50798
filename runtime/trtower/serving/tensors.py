"""What tensors are called, and of which types, between clients and servers: the same on Triton and on Ray."""

from typing import Any

import torch

from trtower.spec import BY_DTYPE, UINT8

PIXEL_VALUES, IMAGE = "pixel_values", "image"
"""The inputs: prepared pictures, as every bundle calls them, or encoded ones."""

BYTES = "BYTES"
"""The protocol's type of encoded pictures."""


def wire_type(dtype: str) -> str:
    """Return the protocol's type of a tensor that a tower takes or gives: FP32 for BF16, which NumPy lacks."""
    name = "UINT8" if dtype == UINT8 else BY_DTYPE[dtype].triton
    return "FP32" if name == "BF16" else name


def as_array(features: torch.Tensor) -> Any:
    """Return features on the CPU as an array of that type."""
    return (features.float() if features.dtype == torch.bfloat16 else features).numpy()
