"""The projector of LLaVA and its successors in transformers: two linear layers with an activation between.

LLaVA-NeXT and OneVision project each tile by itself. They put the tiles together afterwards, by the shape of the
picture, which stays with the model.
"""

from functools import partial
from typing import Any

from torch import nn

from trtower_export.heads.base import Head, transformers_class

CLASSES = {
    "llava": "LlavaMultiModalProjector",
    "llava_next": "LlavaNextMultiModalProjector",
    "llava_next_video": "LlavaNextVideoMultiModalProjector",
    "llava_onevision": "LlavaOnevisionMultiModalProjector",
}


def _own(model: str, config: Any) -> nn.Module:
    module: nn.Module = transformers_class(model, CLASSES[model])(config)
    return module


HEADS = tuple(
    Head(name=name, model_types=(model,), attribute="multi_modal_projector", own=partial(_own, model))
    for model, name in CLASSES.items()
)
