"""CLIP: OpenAI's ViTs, MetaCLIP, DFN, and everything else that loads as `CLIPVisionModel`."""

from functools import partial
from typing import Any

import torch
from torch import nn

from trtower.spec import Naming
from trtower_export.families.base import Family, Pieces, interpolate_positions, read_states, replaced, run_layer


def flat(model: nn.Module) -> Any:
    """Find the tower. These models are flat since transformers 5.6; older ones wrap it as `vision_model`."""
    return getattr(model, "vision_model", model)


def resized_embeddings(embeddings: Any, num_prefix_tokens: int, image_size: int) -> Any:
    """Return embeddings whose positions fit S pixels: the same object if they already fit."""
    if image_size == embeddings.image_size:
        return embeddings
    num_positions = num_prefix_tokens + (image_size // embeddings.patch_size) ** 2
    positions = interpolate_positions(embeddings, num_positions, embeddings.embed_dim, image_size)
    return replaced(
        embeddings,
        image_size=image_size,
        num_positions=num_positions,
        position_embedding=nn.Embedding.from_pretrained(positions[0]),
        position_ids=torch.arange(num_positions).expand((1, -1)),
    )


def take_apart(model: nn.Module, image_size: int) -> Pieces:
    """Take a `CLIPVisionModel` or a `MetaClip2VisionModel` apart."""
    vision = flat(model)
    stem = nn.Sequential(resized_embeddings(vision.embeddings, 1, image_size), vision.pre_layrnorm)
    return Pieces(stem=stem, layers=vision.encoder.layers, final_norm=nn.Identity())


FAMILY = Family(
    name="clip",
    model_types=("clip_vision_model",),
    model_class="CLIPVisionModel",
    patch_embedding="embeddings.patch_embedding.weight",
    num_prefix_tokens=lambda config: 1,
    take_apart=take_apart,
    naming=Naming(final_norm=(), unread=("post_layernorm",)),  # CLIP norms only what it pools
    # transformers 4.57 requires causal_attention_mask; 5.x passes it through.
    run_layer=partial(run_layer, attention_mask=None, causal_attention_mask=None),
    read_states=partial(read_states, interpolate_pos_encoding=True),
    preprocessor={
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
)
