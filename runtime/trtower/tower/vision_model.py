"""The vision model inside a built tower, for model code that reaches through LLaVA's wrapper to its `vision_tower`.

LLaVA's own wrapper holds a vision model of transformers under that name. tinychat calls it and picks hidden states
itself; VILA saves it. A built tower holds an engine, and makes this when it is asked for.

Shapes: B images, S pixels a side, P prefix tokens, N patches, D features a token (see spec.py).
"""

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trtower.errors import ConfigError
from trtower.tower.outputs import Outputs


class VisionModel(nn.Module):
    """Answers like the vision model of transformers that the bundle was made of, with the states that the bundle holds.

    If transformers and its auto classes are imported, it is an instance of the class that they map its `model_type` to,
    because tinychat asks for CLIP's.
    """

    _tower: Any  # a VisionTower, whose module imports this one

    def forward(self, pixel_values: Tensor, *, output_hidden_states: bool | None = None, **options: Any) -> Any:
        """Turn pixels (B, 3, S, S) into an object with `last_hidden_state` and `hidden_states`, each (B, P + N, D).

        States come on the tower's device, in the dtype of the pixels. One that the bundle does not hold raises
        ConfigError when it is read. Raises InputError as the tower does.
        """
        changes = {name for name, value in options.items() if value is not None and value is not False}
        asked = sorted(changes - {"return_dict"})
        if asked:
            raise ConfigError(f"{asked[0]} cannot be followed by a compiled tower: leave it out.")
        tokens = self._tower.read_tokens(pixel_values).to(pixel_values.dtype)
        outputs = Outputs(self._tower.bundle, self._tower.spec.num_layers, instead=None)
        return SimpleNamespace(
            last_hidden_state=outputs.last_hidden_state(tokens),
            hidden_states=outputs.hidden_states(tokens) if output_hidden_states else None,
        )

    @property
    def config(self) -> Any:
        """The checkpoint's vision config."""
        return self._tower.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the engine computes in."""
        dtype: torch.dtype = self._tower.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        device: torch.device = self._tower.device
        return device

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Copy the bundle to a folder, from where `CLIPVisionTower` and `build_vision_tower` open it again.

        The weights are in the bundle, so a ``state_dict`` has nothing to add. Raises BundleError where the folder holds
        anything but a bundle.
        """
        self._tower.bundle.copy_to(Path(save_directory))

    def extra_repr(self) -> str:
        """Tell what `print(model)` should show of this module."""
        return str(self._tower.extra_repr())


def make_vision_model(tower: Any, anchor: nn.Module) -> VisionModel:
    """Make the vision model of a `VisionTower`. Its one parameter is that of ``anchor``."""
    model: VisionModel = object.__new__(_class_for(str(tower.config.model_type)))
    nn.Module.__init__(model)
    vars(model)["_tower"] = tower  # not registered: the tower is around this, not in it
    model._modules["anchor"] = anchor
    return model.eval()


def _class_for(model_type: str) -> Any:
    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    name = None if auto is None else auto.MODEL_MAPPING_NAMES.get(model_type)
    return VisionModel if name is None else named_as(getattr(sys.modules["transformers"], name), VisionModel)


@functools.cache
def named_as(replaced: Any, kind: Any) -> Any:
    """Make a ``kind`` that is named as what it replaces: save_pretrained writes the name into config.json."""
    names = {"__module__": replaced.__module__, "__qualname__": replaced.__qualname__}
    return type(replaced.__name__, (kind, replaced), names)
