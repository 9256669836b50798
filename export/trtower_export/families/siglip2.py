"""SigLIP 2 NaFlex: Google's ViTs that load as `Siglip2VisionModel`, at one square grid.

NaFlex accepts lists of patches of any aspect ratio, padded to one length. Here a tower accepts only square images of
one size S, so nothing is padded and the position embeddings are resized once.
"""

from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from trtower_export.families import siglip
from trtower_export.families.base import Family, Pieces, read_states, run_layer
from trtower_export.families.clip import flat


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches as transformers' image processor does: (B, 3, S, S) -> (B, N, 3 * patch_size**2)."""
    batch, channels, size, _ = pixel_values.shape
    side = size // patch_size
    patches = pixel_values.reshape(batch, channels, side, patch_size, side, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, side * side, -1)


class _Stem(nn.Module):
    def __init__(self, embeddings: Any, image_size: int) -> None:
        super().__init__()
        self.patch_size = embeddings.patch_size
        self.patch_embedding = embeddings.patch_embedding
        side, trained = image_size // self.patch_size, embeddings.position_embedding_size
        table = embeddings.position_embedding.weight.detach().reshape(trained, trained, -1)
        positions = embeddings.resize_positional_embeddings(table, torch.tensor([[side, side]]), max_length=side * side)
        self.position_embedding = nn.Parameter(positions)  # (1, N, D)

    def forward(self, pixel_values: Tensor) -> Tensor:
        embedded: Tensor = self.patch_embedding(patchify(pixel_values, self.patch_size))
        return embedded + self.position_embedding


def _take_apart(model: nn.Module, image_size: int) -> Pieces:
    vision = flat(model)
    stem = _Stem(vision.embeddings, image_size)
    return Pieces(stem=stem, layers=vision.encoder.layers, final_norm=vision.post_layernorm)


def _read_states(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
    patches = patchify(pixel_values, flat(model).embeddings.patch_size)
    batch, num_patches, _ = patches.shape
    return read_states(
        model,
        patches,
        pixel_attention_mask=torch.ones(batch, num_patches, dtype=torch.int32),
        spatial_shapes=torch.full((batch, 2), isqrt(num_patches)),
    )


def _obstacle(config: Any) -> str | None:
    near = isqrt(config.num_patches) ** 2
    if near == config.num_patches:
        return None
    return f"num_patches={config.num_patches} is not a square grid, which resizing the positions needs; {near} is."


def _size_obstacle(config: Any, image_size: int) -> str | None:
    rest = image_size % config.patch_size
    if not rest:
        return None
    near = max(image_size - rest, config.patch_size)
    return f"image_size={image_size} is not a multiple of the patch size {config.patch_size}; {near} is."


FAMILY = Family(
    name="siglip2",
    model_types=("siglip2_vision_model",),
    model_class="Siglip2VisionModel",
    patch_embedding="embeddings.patch_embedding.weight",
    num_prefix_tokens=lambda config: 0,
    take_apart=_take_apart,
    image_size=lambda config: isqrt(config.num_patches) * config.patch_size,
    run_layer=partial(run_layer, attention_mask=None),
    read_states=_read_states,
    obstacle=_obstacle,
    size_obstacle=_size_obstacle,
    preprocessor={**siglip.FAMILY.preprocessor, "size": {"height": 256, "width": 256}, "resample": 2},
)
