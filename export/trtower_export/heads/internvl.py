"""InternVL's projector: squares of patches side by side (pixel shuffle), a LayerNorm and two linear layers."""

from math import isqrt

from torch import Tensor, nn

from trtower_export.heads.base import Head, Parts, transformers_class

NAME = "InternVLMultiModalProjector"


class PixelShuffle(nn.Module):
    """Puts squares of patches side by side, in the order of InternVL: (B, N, D) -> (B, N * r², D / r²)."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self._shuffle = transformers_class("internvl", "InternVLModel").pixel_shuffle  # reads nothing of the model

    def forward(self, patches: Tensor) -> Tensor:
        """Shuffle a square grid of patches."""
        batch, count, width = patches.shape
        grid = patches.reshape(batch, isqrt(count), isqrt(count), width)
        shuffled: Tensor = self._shuffle(None, grid, scale_factor=self.ratio)
        return shuffled.reshape(batch, -1, shuffled.shape[-1])


def _steps(parts: Parts) -> dict[str, nn.Module]:
    assert parts.own is not None  # noqa: S101 - `own` makes it
    return {"shuffle": PixelShuffle(parts.config.downsample_ratio), "projector": parts.own}


HEADS = (
    Head(
        name=NAME,
        model_types=("internvl",),
        attribute="multi_modal_projector",
        own=lambda config: transformers_class("internvl", NAME)(config),
        steps=_steps,
    ),
)
