"""What a model of transformers reads of its vision tower, by its config. No transformers.

Sources: `get_image_features` of each model in transformers 4.57 and 5.23.
"""

from typing import Any

from trtower.layer_codes import LAST, LayerCode

READS_LAYER = ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "aya_vision", "internvl")
"""Model types that read the layer that their config's `vision_feature_layer` names."""

READS_LAST = ("paligemma", "gemma3", "cohere2_vision", "blip-2")
"""Model types that read `last_hidden_state`. Of all others nothing is known."""


def is_contrastive(config: Any, vision_config: Any) -> bool:
    """Whether this is CLIP, or one like it, which reads one pooled vector of an image and no hidden state."""
    return bool(vision_config.model_type == f"{getattr(config, 'model_type', None)}_vision_model")


def read_vision_feature_layer(config: Any) -> LayerCode | None:
    """Give the layer code that a model reads; None where its config does not say, or nothing is known of it."""
    layer: Any = None
    model_type = getattr(config, "model_type", None)
    if model_type in READS_LAYER:
        # VipLlava's has an s in transformers 4.57.
        layer = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    if model_type in READS_LAST or (model_type == "internvl" and layer == -1):
        return LAST
    return list(layer) if isinstance(layer, tuple) else layer
