"""Encode images apart from the language model, into the form that each transformers class accepts."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trtower.errors import ConfigError, InputError
from trtower.installation.find import find_towers

MODALITIES = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modality -> its pixels, in `generate` of transformers 5."""


@torch.no_grad()
def encode_for(model: nn.Module, images: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """Encode images for `model.generate(mm_encoder_outputs=…)`, which then needs no pixels (transformers 5.23 has it).

    `generate` changes the result that it is given, so encode again for every call.

    Args:
        model: A model of transformers with a bundle installed.
        images: What the model's processor returns: at least everything that `get_image_features` or
            `get_video_features` requires. A tensor stands for `pixel_values`.

    Returns:
        The features after the model's own projector, under "image" and "video": each is a plain
        `BaseModelOutputWithPooling` whose `pooler_output` has the form of the model's class. They are on the model's
        device and can be pickled.

    Raises:
        ConfigError: No bundle is installed, or the model does not accept such features.
        InputError: ``images`` holds no pixels, lacks something that the model requires, or is of another type.
    """
    if not isinstance(images, Tensor | Mapping):
        raise InputError(f"images is of type {type(images).__name__}; expected what the model's processor returns.")
    if not any(place.installation for place in find_towers(model)):
        raise ConfigError(f"{type(model).__name__} has no bundle installed: call trtower.install(model, bundle) first.")
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if not isinstance(model, PreTrainedModel):
        inside = next((name for name, each in model.named_modules() if isinstance(each, PreTrainedModel)), "…")
        raise ConfigError(
            f"{type(model).__name__} is not a model of transformers: pass the one inside it, model.{inside}."
        )
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{type(model).__name__}.forward has no mm_encoder_outputs, so its generate accepts no features: use "
            "transformers 5.23, which has it."
        )
    inputs = {"pixel_values": images} if isinstance(images, Tensor) else images
    base: Any = model.base_model
    encoded = {}
    for modality, pixels in MODALITIES.items():
        if inputs.get(pixels) is None:
            continue
        encode = getattr(base, f"get_{modality}_features", None)
        if encode is None:
            raise ConfigError(f"{type(model).__name__} cannot encode {modality}: leave {pixels} out of images.")
        parameters = inspect.signature(encode).parameters
        arguments = {name: inputs[name] for name in parameters if name in inputs}
        missing = [name for name, each in parameters.items() if _is_required(each) and name not in arguments]
        if missing:
            raise InputError(
                f"images lacks {', '.join(missing)}, which {type(model).__name__} requires: pass everything that the "
                "model's processor returns."
            )
        features = encode(**arguments, return_dict=True).pooler_output
        encoded[modality] = BaseModelOutputWithPooling(pooler_output=features)
    if not encoded:
        names = ", ".join(inputs) or "nothing"
        raise InputError(f"images has {names}; expected {' or '.join(MODALITIES.values())}.")
    return encoded


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
