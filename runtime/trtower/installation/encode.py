"""Encode images apart from the language model: features in the form in which each class of transformers takes them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trtower.errors import ConfigError, InputError
from trtower.installation.find import find_towers

MODALITIES = {"image": "pixel_values", "video": "pixel_values_videos"}
"""What `generate` of transformers 5 encodes, and what it encodes it from."""


@torch.no_grad()
def encode_for(model: nn.Module, images: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """Give what `generate(mm_encoder_outputs=…)` of a model of transformers takes in the place of pixels (as of 5.23).

    ``images`` is what the model's processor makes, of which all that `get_image_features` asks for is taken, or
    `pixel_values` alone. The features are those after the model's own projector, under "image" and "video", each the
    `pooler_output` of a plain `BaseModelOutputWithPooling` in the form of the model's class; they are on the model's
    device and can be pickled. `generate` fills in what it is given, so give it every time a result of its own.

    Raises ConfigError where no bundle is installed, or the model takes no such features, and InputError.
    """
    if not isinstance(images, Tensor | Mapping):
        raise InputError(f"images is of type {type(images).__name__}; what the model's processor makes is expected.")
    if not any(place.installation for place in find_towers(model)):
        raise ConfigError(f"{type(model).__name__} has no bundle installed: trtower.install(model, bundle) first.")
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if not isinstance(model, PreTrainedModel):
        inside = next((name for name, each in model.named_modules() if isinstance(each, PreTrainedModel)), "…")
        raise ConfigError(f"{type(model).__name__} is no model of transformers: give the one inside, model.{inside}.")
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{type(model).__name__}.forward has no mm_encoder_outputs, so its generate takes no features: that of "
            "transformers 5.23 does."
        )
    inputs = {"pixel_values": images} if isinstance(images, Tensor) else images
    base: Any = model.base_model
    encoded = {}
    for modality, pixels in MODALITIES.items():
        if inputs.get(pixels) is None:
            continue
        encode = getattr(base, f"get_{modality}_features", None)
        if encode is None:
            raise ConfigError(f"{type(model).__name__} encodes no {modality}, and {pixels} is given.")
        parameters = inspect.signature(encode).parameters
        wanted = {name: inputs[name] for name in parameters if name in inputs}
        lacking = [name for name, each in parameters.items() if _is_required(each) and name not in wanted]
        if lacking:
            raise InputError(
                f"images lacks {', '.join(lacking)}, which {type(model).__name__} asks for: give all that the model's "
                "processor makes."
            )
        features = encode(**wanted, return_dict=True).pooler_output
        encoded[modality] = BaseModelOutputWithPooling(pooler_output=features)
    if not encoded:
        found = ", ".join(inputs) or "nothing"
        raise InputError(f"images has {found}; {' or '.join(MODALITIES.values())} is expected.")
    return encoded


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
