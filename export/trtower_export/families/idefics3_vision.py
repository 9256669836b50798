"""Idefics3's SigLIP, which loads as `Idefics3VisionTransformer`, at one square grid.

Its positions are learned for the grid of the config. transformers assigns one of them to each patch by where the patch
lies in the picture; it interpolates nothing. Here a tower accepts only square images of one size S, so no patch is
masked and the positions are assigned once. On the config's own grid each patch must get its own position, as in
training: transformers 4.57 shifts them, and a tower that it computes is refused.
"""

from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from trtower_export.families import siglip
from trtower_export.families.base import Family, Pieces, replaced, run_layer


class _Ids(nn.Module):
    """Returns ids (B, N) as (B, N, 1), in place of their embeddings."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return position_ids[..., None]


def assigned_positions(embeddings: Any, image_size: int) -> Tensor:
    """Return which learned position transformers' own code assigns to each patch of S pixels in FP32: (N,)."""
    patch = embeddings.patch_size
    # Without weights, black patches are zeros, and what the embeddings add to them are the ids.
    blank = replaced(embeddings, patch_embedding=nn.AvgPool2d(patch), position_embedding=_Ids())
    side = image_size // patch
    mask = torch.ones(1, side, side, dtype=torch.bool)
    with torch.no_grad():
        ids: Tensor = blank(torch.zeros(1, 3, image_size, image_size), patch_attention_mask=mask)
    return ids[0, :, 0].long()


def obstacle(config: Any, model_class: str) -> str | None:
    """Return why a config cannot be exported: transformers assigns the positions of its own grid wrongly."""
    sizes = {name: getattr(config, name) for name in ("image_size", "patch_size")}
    tiny = {"hidden_size": 1, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 1}
    embeddings = getattr(transformers, model_class)(type(config)(**tiny, **sizes)).embeddings
    ids = assigned_positions(embeddings, config.image_size)
    if torch.equal(ids, torch.arange(len(ids))):
        return None
    side = config.image_size // config.patch_size
    return (
        f"transformers {transformers.__version__} does not give each of its {side} x {side} patches its own position, "
        "as in training (issue 41190 of transformers). Export it with transformers 5.23, which does for grids of 16, "
        "24, 26, 27, 28 and 32 patches a side"
    )


class _Stem(nn.Module):
    def __init__(self, embeddings: Any, image_size: int) -> None:
        super().__init__()
        self.patch_embedding = embeddings.patch_embedding
        table, ids = embeddings.position_embedding.weight, assigned_positions(embeddings, image_size)
        fits = torch.equal(ids, torch.arange(len(table)))
        self.position_embedding = table if fits else nn.Parameter(table.detach()[ids])  # (N, D)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches: Tensor = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)
        return patches + self.position_embedding


def _take_apart(model: Any, image_size: int) -> Pieces:
    stem = _Stem(model.embeddings, image_size)
    return Pieces(stem=stem, layers=model.encoder.layers, final_norm=model.post_layernorm)


FAMILY = Family(
    name="idefics3_vision",
    model_types=("idefics3_vision",),
    model_class="Idefics3VisionTransformer",
    patch_embedding="embeddings.patch_embedding.weight",
    num_prefix_tokens=lambda config: 0,
    take_apart=_take_apart,
    run_layer=partial(run_layer, attention_mask=None),
    # One tile; the models' own processors cut pictures into many.
    obstacle=partial(obstacle, model_class="Idefics3VisionTransformer"),
    preprocessor={**siglip.FAMILY.preprocessor, "size": {"height": 364, "width": 364}, "resample": 1},
)
