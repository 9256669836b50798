"""What a tower answers about itself, loaded or not, and what it reads of its bundle.

Shapes: B images, N patches, D features per token (see spec.py).
"""

import json
import os
from typing import Any

import torch
from torch import nn

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import CONFIG
from trtower.dtypes import DTYPES
from trtower.layer_codes import LayerCode
from trtower.tower.dicts import AttributeDict
from trtower.tower.pick import pick, whole_code


class TowerConfig(AttributeDict):
    """The vision config as Hugging Face wrote it, read by key or attribute. VILA saves it in the model's config."""

    def to_dict(self) -> dict[str, Any]:
        """Return the config, as in config.json."""
        return dict(self)


class TowerAnswers(nn.Module):
    """The part of a tower that runs nothing: the bundle's facts, and the layers and tokens that are read of it."""

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        select_layer: LayerCode | None,
        select_feature: str | None,
        *,
        count_cls: bool,
    ) -> None:
        super().__init__()
        self.bundle = Bundle.open(bundle)
        self.spec = self.bundle.manifest.spec
        self.vision_tower_name = str(bundle)
        self.cfg_only = TowerConfig(**json.loads(self.bundle.read(CONFIG)))
        self.count_cls = count_cls
        self.select(
            whole_code(self.spec) if select_layer is None else select_layer,
            self.spec.select_feature if select_feature is None else select_feature,
        )

    def select(self, select_layer: LayerCode, select_feature: str) -> None:
        """Choose the layers and tokens to read from those that the bundle holds.

        Args:
            select_layer: Any layer code of layer_codes.py.
            select_feature: The tokens, such as "patch" or "cls_patch"; a slice such as "slicefour_patch" also chooses
                layers.

        Raises:
            ConfigError: If a code is invalid, or the bundle lacks a layer. The choice then stays as it was.
        """
        self._pick = pick(self.bundle, select_layer, select_feature)
        self._select_layer, self._select_feature = select_layer, select_feature

    @property
    def select_layer(self) -> LayerCode:
        """The layer code that is read. Setting it keeps the feature code; `select` sets both at once."""
        return self._select_layer

    @select_layer.setter
    def select_layer(self, select_layer: LayerCode) -> None:
        self.select(select_layer, self._select_feature)

    @property
    def select_feature(self) -> str:
        """The feature code, as configured. Setting it rereads the layer code, which a slice shifts or replaces."""
        return self._select_feature

    @select_feature.setter
    def select_feature(self, select_feature: str) -> None:
        self.select(self._select_layer, select_feature)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the engine's features, whatever the dtype of the images."""
        return DTYPES[self.bundle.manifest.output.dtype]

    @property
    def config(self) -> TowerConfig:
        """The checkpoint's vision config."""
        return self.cfg_only

    @property
    def hidden_size(self) -> int:
        """D: the width of a feature: over all picked layers, or after the bundle's head."""
        return self._pick.hidden_size

    @property
    def num_tokens(self) -> int:
        """The features of an image that a call returns: the tokens kept or projected, or 1 for an embedding."""
        return self._pick.num_tokens

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of one image's features: (N, D), or (D,) of an embedding."""
        return self._pick.row

    @property
    def image_size(self) -> int:
        """S: the pixels per side of an image."""
        return self.spec.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the image."""
        return self.spec.num_patches_per_side

    @property
    def num_patches(self) -> int:
        """N: the patches of an image, whatever is kept or made of them; with `count_cls`, all kept tokens."""
        counts_tokens = self.count_cls and not self.spec.head
        return self._pick.num_tokens if counts_tokens else self.spec.num_patches
