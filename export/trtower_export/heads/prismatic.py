"""The projector of OpenVLA and Prismatic: two linear layers for one tower, and three for a pair.

Its code is not in transformers. Source: `PrismaticProjector` in `modeling_prismatic.py` of OpenVLA.
"""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from trtower_export.heads.base import Head


class Projector(nn.Module):
    """`PrismaticProjector`: (B, N, D) -> (B, N, width of the language model)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.act_fn = nn.GELU()
        for number, (before, after) in enumerate(pairwise(widths), start=1):
            setattr(self, f"fc{number}", nn.Linear(before, after))
        self._layers = len(widths) - 1

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layers, with an activation between each two."""
        for number in range(1, self._layers + 1):
            layer = getattr(self, f"fc{number}")
            features = layer(features if number == 1 else self.act_fn(features))
        return features


def _own(config: Any) -> nn.Module:
    width, out = config.vision_config.hidden_size, config.text_config["hidden_size"]
    return Projector((width, 4 * width, out, out) if config.use_fused_vision_backbone else (width, out, out))


HEADS = (
    Head(
        name="PrismaticProjector",
        model_types=("openvla", "prismatic"),
        attribute="projector",
        own=_own,
        settings=("use_fused_vision_backbone",),
    ),
)
