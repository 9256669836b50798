"""What a check reports about each image: the input for pictures, plots and the report page.

Letters: S pixels a side, P prefix tokens, N patches, D features a token.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageEvidence:
    """One image of a check: its pixels (3, S, S) as the tower received them, and all its tokens (P + N, D).

    ``reference`` is from PyTorch in FP32, ``bundle`` from the bundle at the minimum batch, ``torch`` from PyTorch in
    the bundle's own precision. All tensors are FP32 on the CPU. ``kind`` is "photograph", "noise", "constant" or
    "saturated".
    """

    name: str
    kind: str
    pixel_values: Tensor
    reference: Tensor
    bundle: Tensor
    torch: Tensor
