"""InternVL's projector: squares of patches side by side (pixel shuffle), a LayerNorm and two linear layers."""

from math import isqrt

from torch import Tensor, nn

from trtower_export.heads.base import projector_of, transformers_class


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


HEADS = (
    projector_of(
        "internvl",
        "InternVLMultiModalProjector",
        "projector_hidden_act",
        "downsample_ratio",
        steps=lambda parts: {"shuffle": PixelShuffle(parts.config.downsample_ratio), "projector": parts.projector},
    ),
)
