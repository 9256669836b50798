"""The connector of Idefics3 and SmolVLM: squares of patches side by side (pixel shuffle), then one linear layer."""

from functools import partial
from typing import Any

from torch import nn

from trtower_export.heads.base import Head, transformers_class

CLASSES = {"idefics3": "Idefics3Connector", "smolvlm": "SmolVLMConnector"}


def _own(model: str, config: Any) -> nn.Module:
    module: nn.Module = transformers_class(model, CLASSES[model])(config)
    return module


HEADS = tuple(
    Head(name=name, model_types=(model,), attribute="connector", own=partial(_own, model))
    for model, name in CLASSES.items()
)
