"""Map the dtype names of a manifest to torch dtypes."""

import torch

from trtower.spec import BY_DTYPE

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in BY_DTYPE}
