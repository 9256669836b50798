"""The vision model inside a compiled tower, for model code that reaches through LLaVA's wrapper to its `vision_tower`.

Under that name LLaVA's own wrapper holds a vision model of transformers. tinychat calls it and picks hidden states
itself; VILA saves it. A compiled tower holds an engine instead, and makes this model when `vision_tower` is read.

Shapes: B images, S pixels per side, P prefix tokens, N patches, D features per token (see spec.py).
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
    """Answers like the vision model of transformers behind the bundle, with the states that the bundle holds.

    If transformers and its auto classes are imported, it is also an instance of the class that they map its
    `model_type` to, because tinychat checks for CLIP's class.
    """

    _tower: Any  # a VisionTower; its module imports this one

    def forward(self, pixel_values: Tensor, *, output_hidden_states: bool | None = None, **options: Any) -> Any:
        """Turn pixels (B, 3, S, S) into an object with `last_hidden_state` and `hidden_states`, each (B, P + N, D).

        Args:
            pixel_values: Images of the engine's size, as `VisionTower.read_tokens` accepts them.
            output_hidden_states: Whether to return `hidden_states`; otherwise that is None.
            **options: Other options of the eager model, which must be None or False; `return_dict` is ignored.

        Returns:
            The states on the tower's device, in the dtype of the pixels. A state that the bundle does not hold raises
            ConfigError when it is read.

        Raises:
            InputError: If `pixel_values` has a wrong type, shape or dtype.
            ConfigError: If another option is set.
            BackendError: If the tower is not loaded, or cannot run here.
        """
        changes = {name for name, value in options.items() if value is not None and value is not False}
        unsupported = sorted(changes - {"return_dict"})
        if unsupported:
            raise ConfigError(f"{unsupported[0]} is not supported by a compiled tower: leave it out.")
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
        """The dtype of the engine's input and output."""
        dtype: torch.dtype = self._tower.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device that the tower runs on."""
        device: torch.device = self._tower.device
        return device

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Copy the bundle to a folder, where `CLIPVisionTower` and `build_vision_tower` can open it.

        Other arguments of transformers' method are ignored, even ``state_dict``: the weights are in the bundle.

        Args:
            save_directory: The folder: new, empty, or with a bundle. A bundle of the same tower stays as it is; any
                other is replaced.

        Raises:
            BundleError: If the folder holds anything but a bundle, or a file of this bundle was altered.
            BuildError: If the disk is full.
        """
        self._tower.bundle.copy_to(Path(save_directory))

    def extra_repr(self) -> str:
        """Return what `print(model)` shows for this module."""
        return str(self._tower.extra_repr())


def make_vision_model(tower: Any, anchor: nn.Module) -> VisionModel:
    """Make the vision model of a `VisionTower`. Its only parameter is that of ``anchor``."""
    model: VisionModel = object.__new__(_class_for(str(tower.config.model_type)))
    nn.Module.__init__(model)
    vars(model)["_tower"] = tower  # not registered as a submodule: the tower contains this model, not the reverse
    model._modules["anchor"] = anchor
    return model.eval()


def _class_for(model_type: str) -> Any:
    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    name = None if auto is None else auto.MODEL_MAPPING_NAMES.get(model_type)
    return VisionModel if name is None else named_as(getattr(sys.modules["transformers"], name), VisionModel)


@functools.cache
def named_as(replaced: Any, kind: Any) -> Any:
    """Subclass ``kind`` under the name of the class it replaces: save_pretrained writes that name into config.json."""
    names = {"__module__": replaced.__module__, "__qualname__": replaced.__qualname__}
    return type(replaced.__name__, (kind, replaced), names)
