"""CLIP: OpenAI's ViTs and all that load as `CLIPVisionModel`."""

from typing import Any

from torch import Tensor, nn

from trtower_export.families.base import Family


def _vision(model: nn.Module) -> Any:
    """`CLIPVisionModel` is flat since transformers 5.6 and wraps `vision_model` before."""
    return getattr(model, "vision_model", model)


def _stem(model: nn.Module) -> nn.Module:
    vision = _vision(model)
    return nn.Sequential(vision.embeddings, vision.pre_layrnorm)


def _layers(model: nn.Module) -> nn.ModuleList:
    layers: nn.ModuleList = _vision(model).encoder.layers
    return layers


def _run_layer(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    # transformers 4.57 demands causal_attention_mask and gives a tuple; 5.x passes the name through.
    output = layer(hidden_states, attention_mask=None, causal_attention_mask=None)
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


FAMILY = Family(
    name="clip",
    model_types=("clip_vision_model", "clip"),
    model_class="CLIPVisionModel",
    num_prefix_tokens=lambda config: 1,
    stem=_stem,
    layers=_layers,
    run_layer=_run_layer,
    preprocessor={
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
)
