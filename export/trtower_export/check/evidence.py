"""What a check hands on of one image, so that a picture, a plot or a page can be made of it.

Letters: S pixels a side, P prefix tokens, N patches, D features a token.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageEvidence:
    """What the check saw of one image: its pixels (3, S, S) as the tower was given them, and all its tokens (P + N, D).

    The tokens are from FP32 PyTorch, from the bundle at the minimum batch, and from PyTorch in the bundle's own
    precision; all on the CPU, in FP32. ``kind`` is "photograph", "noise", "constant" or "saturated".
    """

    name: str
    kind: str
    pixel_values: Tensor
    reference: Tensor
    bundle: Tensor
    torch: Tensor
