"""EVA-CLIP ViT-g as transformers has it: `Blip2VisionModel`, from which BLIP-2 has already dropped the last layer."""

from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

from trtower_export.families import clip
from trtower_export.families.base import Family, Pieces, read_states, replaced, resized_positions, run_layer


def _take_apart(model: Any, image_size: int) -> Pieces:
    positions = resized_positions(model.embeddings, model.embeddings.position_embedding, image_size)
    stem = replaced(model.embeddings, position_embedding=positions)
    return Pieces(stem=stem, layers=model.encoder.layers, final_norm=model.post_layernorm)


def _run_layer(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    # transformers 4.57 requires a mask; 5.x would pass it to an attention that already gets one.
    required = {"attention_mask"} & signature(layer.forward).parameters.keys()
    return run_layer(layer, hidden_states, **dict.fromkeys(required))


FAMILY = Family(
    name="eva_clip",
    model_types=("blip_2_vision_model",),
    model_class="Blip2VisionModel",
    patch_embedding="embeddings.patch_embedding.weight",
    num_prefix_tokens=lambda config: 1,
    take_apart=_take_apart,
    run_layer=_run_layer,
    read_states=partial(read_states, interpolate_pos_encoding=True),
    preprocessor={
        **clip.FAMILY.preprocessor,
        "image_processor_type": "SiglipImageProcessor",  # resizes to a square without cropping, as BLIP's own does
        "size": {"height": 224, "width": 224},
    },
)
