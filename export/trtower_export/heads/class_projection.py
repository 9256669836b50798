"""The embedding of CLIP, MetaCLIP and OpenCLIP: the CLS token, normed, and multiplied by the projection.

As `get_image_features` of CLIPModel, or `image_embeds` of CLIPVisionModelWithProjection, before they are normalised.
"""

from typing import Any

from torch import nn

from trtower.head import EMBEDDING
from trtower_export.families.clip import flat
from trtower_export.heads.base import Head, Parts
from trtower_export.heads.class_token import ClassToken


def _own(config: Any) -> nn.Module:
    vision = getattr(config, "vision_config", config)
    return nn.Linear(vision.hidden_size, config.projection_dim, bias=False)


def _steps(parts: Parts) -> dict[str, nn.Module]:
    return {"cls": ClassToken(), "norm": flat(parts.tower).post_layernorm, "projection": parts.projector}


HEADS = (
    Head(
        name="CLS projection",
        kind=EMBEDDING,
        model_types=("clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model"),
        attribute="visual_projection",
        own=_own,
        steps=_steps,
    ),
)
