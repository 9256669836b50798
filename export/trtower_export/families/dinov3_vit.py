"""DINOv3: Meta's ViTs that load as `DINOv3ViTModel`. The prefix is CLS, then the registers.

Positions are rotations of queries and keys in every layer. Their angles depend only on the grid, so every S is possible
and they are computed once.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trtower_export.families.base import Family, Pieces, replaced, run_layer


class _Rotation(nn.Module):
    """The cosines and sines (N, D / heads) of a grid, shared by all layers, even after a cast."""

    cos: Tensor
    sin: Tensor

    def __init__(self, rope_embeddings: nn.Module, image_size: int) -> None:
        super().__init__()
        cos, sin = rope_embeddings(torch.empty(1, 3, image_size, image_size))
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)


class _Layer(nn.Module):
    """A transformer layer that passes its rotation to the attention."""

    def __init__(self, layer: nn.Module, rotation: _Rotation) -> None:
        super().__init__()
        self.layer, self.rotation = layer, rotation

    def forward(self, hidden_states: Tensor) -> Tensor:
        return run_layer(self.layer, hidden_states, position_embeddings=(self.rotation.cos, self.rotation.sin))


def _take_apart(model: Any, image_size: int) -> Pieces:
    stem = replaced(model.embeddings, mask_token=None)  # only training uses it
    rotation = _Rotation(model.rope_embeddings, image_size)
    layers = getattr(model, "model", model).layer  # transformers 4.57 has them in the model itself
    return Pieces(stem=stem, layers=nn.ModuleList(_Layer(layer, rotation) for layer in layers), final_norm=model.norm)


FAMILY = Family(
    name="dinov3_vit",
    model_types=("dinov3_vit",),
    model_class="DINOv3ViTModel",
    patch_embedding="embeddings.patch_embeddings.weight",
    num_prefix_tokens=lambda config: 1 + int(config.num_register_tokens),
    take_apart=_take_apart,
    preprocessor={
        "image_processor_type": "SiglipImageProcessor",  # resizes to a square without cropping, as DINOv3's own does
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
)
