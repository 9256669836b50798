"""Tell from a config which layer its model reads, and whether the tower was trained. Does not import transformers.

Sources: `get_image_features` of each model in transformers 4.57 and 5.23.
"""

from collections.abc import Callable
from typing import Any

from trtower.layer_codes import LAST, LayerCode

READS_LAYER = ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "aya_vision", "internvl")
"""Model types that read the layer named by `vision_feature_layer` in their config."""

READS_LAST = ("paligemma", "openpi", "gemma3", "cohere2_vision", "blip-2", "idefics3", "smolvlm")
"""Model types that read `last_hidden_state`. What other types read is not known."""

EAGLE = ("eagle_2_5_vl", "eagle_3_vl")
"""The vision-language models of GR00T, which have a `select_layer` of their own."""

TRAINED = (
    "unfreeze_mm_vision_tower",
    "unfreeze_vision_tower",
    "tune_vision_tower",
    "mm_vision_tower_lr",
    "vision_tower_lr",
)
"""Config keys of LLaVA and its forks which say that the tower was trained. If one is set, the tower's weights differ
from those of the checkpoint that the config names."""


def says_trained(get: Callable[[str], Any]) -> str | None:
    """Return the key of a LLaVA config that says that the tower was trained, if any; ``get`` returns a key's value."""
    if "mm_vision_tower" in str(get("mm_tunable_parts")):
        return "mm_tunable_parts"
    return next((key for key in TRAINED if get(key)), None)


def is_contrastive(config: Any, vision_config: Any) -> bool:
    """Whether this is CLIP or a similar model, which reads one pooled vector per image and no hidden state."""
    return bool(vision_config.model_type == f"{getattr(config, 'model_type', None)}_vision_model")


def read_vision_feature_layer(config: Any) -> LayerCode | None:
    """Return the layer code that a model reads; None if its config does not say, or its type is not known here."""
    layer: Any = None
    model_type = getattr(config, "model_type", None)
    if model_type in READS_LAYER:
        # VipLlava's key is plural in transformers 4.57.
        layer = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    if model_type in EAGLE:
        layer = getattr(config, "select_layer", -1)
    if model_type in READS_LAST or (model_type in ("internvl", *EAGLE) and layer == -1):
        return LAST
    return list(layer) if isinstance(layer, tuple) else layer
