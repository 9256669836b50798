"""What a model's config says of its vision tower: what is read of it, and whether it was trained. No transformers.

Sources: `get_image_features` of each model in transformers 4.57 and 5.23.
"""

from collections.abc import Callable
from typing import Any

from trtower.layer_codes import LAST, LayerCode

READS_LAYER = ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "aya_vision", "internvl")
"""Model types that read the layer that their config's `vision_feature_layer` names."""

READS_LAST = ("paligemma", "gemma3", "cohere2_vision", "blip-2")
"""Model types that read `last_hidden_state`. Of all others nothing is known."""


TRAINED = (
    "unfreeze_mm_vision_tower",
    "unfreeze_vision_tower",
    "tune_vision_tower",
    "mm_vision_tower_lr",
    "vision_tower_lr",
)
"""Keys with which LLaVA and its forks say that the tower they name is not the tower they were trained with."""


def says_trained(said: Callable[[str], Any]) -> str | None:
    """Return the key of a LLaVA config that says that the tower was trained; ``said`` returns a key's value."""
    if "mm_vision_tower" in str(said("mm_tunable_parts")):
        return "mm_tunable_parts"
    return next((key for key in TRAINED if said(key)), None)


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
