"""PaliGemma's projector: one linear layer; some releases of transformers then divide by the root of the text width.

Gemma multiplies every embedding by that root, also those of images. Releases that divide do it to undo this; later ones
multiply only the text. Both give the same model, but not the same features, so a bundle says which it holds.

openpi's π and what descends from it have this projector, too. Their code divides in no release: openpi replaces that of
transformers, and LeRobot runs with releases that do not divide.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PaliGemmaConfig

from trtower_export.heads.base import Divide, Head, Parts, projector_of, transformers_class

NAME = "PaliGemmaMultiModalProjector"


@functools.cache
def divides() -> bool:
    """Return whether the installed transformers divides, by asking a tiny model."""
    vision: dict[str, Any] = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    text: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 8}
    vision |= {"model_type": "siglip_vision_model", "image_size": 2, "patch_size": 2, "projection_dim": 16}
    config = PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=16, image_token_index=7)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        model: Any = transformers_class("paligemma", "PaliGemmaModel")(config).eval()
        projected: list[torch.Tensor] = []
        nn.init.ones_(model.multi_modal_projector.linear.bias)
        model.multi_modal_projector.register_forward_hook(lambda *call: projected.append(call[2]))
        features = model.get_image_features(torch.ones(1, 3, 2, 2))
    features = getattr(features, "pooler_output", features)
    return not torch.equal(features, projected[0])


def _divisor(config: Any) -> float:
    return float(config.text_config.hidden_size**0.5) if divides() else 1.0


def _steps(parts: Parts) -> dict[str, nn.Module]:
    divisor = _divisor(parts.config)
    return {"projector": parts.projector} | ({} if divisor == 1.0 else {"divide": Divide(divisor)})


def _of_openpi(config: Any) -> nn.Module:
    """Make the projector from the config of a recipe, which is none of transformers."""
    width = config.text_config["hidden_size"]
    vision = SimpleNamespace(hidden_size=config.vision_config.hidden_size, projection_dim=width)
    module: nn.Module = transformers_class("paligemma", NAME)(SimpleNamespace(vision_config=vision))
    return module


HEADS = (
    projector_of("paligemma", NAME, steps=_steps, divisor=_divisor),
    Head(name=NAME, model_types=("openpi",), attribute="multi_modal_projector", own=_of_openpi),
)
