"""AIMv2: Apple's ViTs that load as `Aimv2VisionModel`. There is no CLS token.

A native tower computes sinusoidal positions from the image, at any size; here they are computed once, for S pixels. The
others have a table of positions that transformers cannot interpolate.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trtower_export.families import clip
from trtower_export.families.base import Family, Pieces, replaced


class _Zeros(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class _NativeStem(nn.Module):
    """The embeddings of a native tower, with positions (1, N, D) as a constant."""

    positions: Tensor

    def __init__(self, embeddings: Any, image_size: int) -> None:
        super().__init__()
        self.patch_embed, self.rms_norm = embeddings.patch_embed, embeddings.rms_norm
        # The function that computes positions moved between releases. With zeros instead of normed patches, the
        # embeddings return only the positions, in every release.
        blank = replaced(embeddings, rms_norm=_Zeros())
        with torch.no_grad():
            positions = blank(torch.zeros(1, 3, image_size, image_size))
        self.register_buffer("positions", positions)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)
        normed: Tensor = self.rms_norm(patches)
        return normed + self.positions


def _take_apart(model: Any, image_size: int) -> Pieces:
    embeddings = model.embeddings
    stem = _NativeStem(embeddings, image_size) if model.config.is_native else embeddings
    return Pieces(stem=stem, layers=model.encoder.layers, final_norm=model.rms_norm)


def _size_obstacle(config: Any, image_size: int) -> str | None:
    if config.is_native or image_size == config.image_size:
        return None
    return (
        f"image_size={image_size}: transformers cannot interpolate the positions of this aimv2 tower, which accepts "
        f"only {config.image_size} pixels; a tower with is_native accepts any size."
    )


FAMILY = Family(
    name="aimv2",
    model_types=("aimv2_vision_model",),
    model_class="Aimv2VisionModel",
    patch_embedding="embeddings.patch_embed.weight",
    num_prefix_tokens=lambda config: 0,
    take_apart=_take_apart,
    size_obstacle=_size_obstacle,
    preprocessor=clip.FAMILY.preprocessor,
)
