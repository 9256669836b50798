"""The projector of Eagle, the vision-language model of GR00T: squares of patches side by side, and one or two layers.

Its code is not in transformers. Sources: `modeling_eagle2_5_vl.py` of Isaac-GR00T, also in LeRobot 0.4.
"""

from typing import Any

from torch import nn

from trtower_export.heads.base import Head, Parts
from trtower_export.heads.internvl import PixelShuffle


def _own(config: Any) -> nn.Module:
    ratio = round(1 / config.downsample_ratio) if config.use_pixel_shuffle else 1
    width, out = config.vision_config.hidden_size * ratio**2, config.text_config["hidden_size"]
    if config.mlp_connector_layers == 1:
        return nn.Sequential(nn.Linear(width, out))
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


def _steps(parts: Parts) -> dict[str, nn.Module]:
    shuffle = {"shuffle": PixelShuffle(parts.config.downsample_ratio)} if parts.config.use_pixel_shuffle else {}
    return shuffle | {"projector": parts.projector}


HEADS = (
    Head(
        name="mlp1",
        model_types=("eagle_2_5_vl",),
        attribute="mlp1",
        own=_own,
        steps=_steps,
        settings=("downsample_ratio", "use_pixel_shuffle", "mlp_connector_layers"),
    ),
)
