"""The projectors of Eagle, the vision-language models of GR00T: squares of patches side by side, and one or two layers.

Their code is not in transformers. Sources: `modeling_eagle2_5_vl.py` of Isaac-GR00T, also in LeRobot 0.4, for N1.5, and
`modeling_eagle3_vl.py` for N1.6. The two put the features of a square in another order.
"""

from math import isqrt
from typing import Any

from torch import Tensor, nn

from trtower_export.heads.base import Head, Parts
from trtower_export.heads.internvl import PixelShuffle


class PixelUnshuffle(nn.Module):
    """Puts squares of patches side by side, in the order of torch's `pixel_unshuffle`: (B, N, D) -> (B, N / r², D r²).

    The features of all patches of a square alternate.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, patches: Tensor) -> Tensor:
        """Unshuffle a square grid of patches."""
        batch, count, width = patches.shape
        side, small = self.side, isqrt(count) // self.side
        squares = patches.reshape(batch, small, side, small, side, width).permute(0, 1, 3, 5, 2, 4)
        return squares.reshape(batch, small**2, width * side**2)


def _own(config: Any) -> nn.Module:
    ratio = round(1 / config.downsample_ratio) if config.use_pixel_shuffle else 1
    width, out = config.vision_config.hidden_size * ratio**2, config.text_config["hidden_size"]
    if config.mlp_connector_layers == 1:
        return nn.Sequential(nn.Linear(width, out))
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


def _steps(parts: Parts) -> dict[str, nn.Module]:
    shuffle = {"shuffle": PixelShuffle(parts.config.downsample_ratio)} if parts.config.use_pixel_shuffle else {}
    return shuffle | {"projector": parts.projector}


def _steps_of_3(parts: Parts) -> dict[str, nn.Module]:
    return {"unshuffle": PixelUnshuffle(round(1 / parts.config.downsample_ratio)), "projector": parts.projector}


HEADS = tuple(
    Head(
        name="mlp1",
        model_types=(model_type,),
        attribute="mlp1",
        own=_own,
        steps=steps,
        settings=("downsample_ratio", "use_pixel_shuffle", "mlp_connector_layers"),
    )
    for model_type, steps in (("eagle_2_5_vl", _steps), ("eagle_3_vl", _steps_of_3))
)
