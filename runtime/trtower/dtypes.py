"""The dtypes that a manifest names, as torch has them."""

import torch

from trtower.spec import BY_DTYPE

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in BY_DTYPE}
