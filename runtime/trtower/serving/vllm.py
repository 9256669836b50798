"""Features for vLLM in place of pictures: its `image_embeds`, offline and for its OpenAI server.

Held against the parsing code of vLLM 0.33.0: `multimodal/parse.py` (`is_embeddings`, `EmbeddingItems`),
`multimodal/media/image.py` (`ImageEmbeddingMediaIO`), and each model's `_process_image_input`. vLLM itself is not
needed here.
"""

import base64
import io
from typing import Any

import torch

from trtower.errors import ConfigError, InputError
from trtower.serving.projected import projector_of
from trtower.tower.vision_tower import VisionTower

TAKEN = {
    "LlavaMultiModalProjector": "LlavaForConditionalGeneration",
    "PaliGemmaMultiModalProjector": "PaliGemmaForConditionalGeneration",
}
"""Projector -> the class of vLLM's that takes its features as they are, (tokens, width) for each picture."""

REFUSED = {
    "Gemma3MultiModalProjector": "its Gemma3ForConditionalGeneration takes no image_embeds",
    "Cohere2VisionMultiModalProjector": "its Cohere2VisionForConditionalGeneration takes no image_embeds",
    "LlavaNextMultiModalProjector": "its LlavaNextForConditionalGeneration wants the tiles of a picture packed already",
    "LlavaOnevisionMultiModalProjector": "its LlavaOnevisionForConditionalGeneration wants tiles packed already",
}
"""Projector -> why vLLM cannot be given its features."""


def image_embeds(tower: VisionTower, pictures: Any) -> torch.Tensor:
    """Encode pictures as vLLM takes them: `llm.generate({"prompt": …, "multi_modal_data": {"image": embeds}})`.

    Start vLLM with `enable_mm_embeds=True`, and write one image placeholder for each picture into the prompt.

    Args:
        tower: A loaded bundle of the model that vLLM serves, exported with `--head projector`.
        pictures: As for `VisionTower.encode`: one, or several.

    Returns:
        The features (pictures, tokens, width of the language model) on the CPU, in the tower's dtype, which vLLM casts
        to the model's.

    Raises:
        ConfigError: The bundle has no projector, or vLLM cannot be given the features of its model.
        InputError: A picture cannot be read.
    """
    head = projector_of(tower.bundle, "vLLM")
    if head.name not in TAKEN:
        reason = REFUSED.get(head.name, f"whether it takes features of {head.name} as they are was not found out")
        raise ConfigError(f"vLLM cannot be given the features of {tower.bundle.path}: {reason}. Give it pictures.")
    features: torch.Tensor = tower.encode(pictures)
    return features.cpu()


def content_parts(embeds: torch.Tensor) -> list[dict[str, str]]:
    """Make the parts of a chat message that hold features, one for each picture, for vLLM's OpenAI server.

    Start it with `--enable-mm-embeds`. The client needs a `{"type": "text", …}` part of its own beside these.

    Args:
        embeds: What `image_embeds` returned, (pictures, tokens, width), or (tokens, width) of one.

    Raises:
        InputError: `embeds` has another shape.
    """
    if embeds.ndim not in (2, 3):
        raise InputError(f"embeds has shape {tuple(embeds.shape)}; expected (pictures, tokens, width).")
    return [
        {"type": "image_embeds", "image_embeds": _as_base64(features)}
        for features in (embeds[None] if embeds.ndim == 2 else embeds)
    ]


def _as_base64(features: torch.Tensor) -> str:
    """Serialise one picture's features as `torch.save` does: every version of vLLM reads that, and BF16 fits in it."""
    stream = io.BytesIO()
    torch.save(features.cpu().clone(), stream)  # a view would save what it is a view of
    return base64.b64encode(stream.getvalue()).decode("ascii")
