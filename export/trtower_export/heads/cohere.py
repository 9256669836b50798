"""The projectors of Aya Vision and Cohere2 Vision: squares of patches side by side, then a gated MLP.

Both return a grid. transformers 5 lists its tokens row by row; 4.57 leaves that to whoever merges them into the text.
"""

from functools import partial
from typing import Any

from torch import nn

from trtower_export.heads.base import Flatten, Head, Parts, transformers_class

CLASSES = {"aya_vision": "AyaVisionMultiModalProjector", "cohere2_vision": "Cohere2VisionMultiModalProjector"}


def _own(model: str, config: Any) -> nn.Module:
    module: nn.Module = transformers_class(model, CLASSES[model])(config)
    return module


def _steps(parts: Parts) -> dict[str, nn.Module]:
    assert parts.own is not None  # noqa: S101 - `own` makes it
    return {"projector": parts.own, "flatten": Flatten()}


HEADS = tuple(
    Head(name=name, model_types=(model,), attribute="multi_modal_projector", own=partial(_own, model), steps=_steps)
    for model, name in CLASSES.items()
)
