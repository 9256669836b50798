"""Map the dtype names of a manifest to torch dtypes."""

import torch

from trtower.spec import BY_DTYPE, UINT8

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in BY_DTYPE}
"""The dtypes of weights and features."""

PIXEL_DTYPES = DTYPES | {UINT8: torch.uint8}
"""The dtypes of pixel values."""
