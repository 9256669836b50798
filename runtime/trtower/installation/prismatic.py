"""The towers of OpenVLA and Prismatic, which are timm's, seen as a vision model of transformers.

A checkpoint brings the file of its class along, so the class is known by its name. It returns the patches of the
second-last block, of one tower or of two side by side.

Shapes: B images, S pixels per side, N patches, D features per token.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trtower.errors import InputError
from trtower.timm_names import translate

CLASS = "PrismaticVisionBackbone"
PARTS = ("featurizer", "fused_featurizer")
PAIR = "prismatic_fused"
SECOND_LAST = -2
CHANNELS = 3


def is_prismatic(module: nn.Module) -> bool:
    """Whether a module is the vision backbone of OpenVLA or Prismatic, or its stand-in."""
    return any(each.__name__ == CLASS for each in type(module).__mro__)


class PrismaticView:
    """A `PrismaticVisionBackbone` with the config, the names and the parameters of a vision model of transformers."""

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._towers: list[Any] = [getattr(backbone, name) for name in PARTS if hasattr(backbone, name)]

    @cached_property
    def config(self) -> Any:
        """What `trtower.install` compares with the vision config in a bundle."""
        embedding = self._towers[0].patch_embed
        return SimpleNamespace(
            model_type=PAIR if len(self._towers) == len(PARTS) else _model_type(self._towers[0]),
            image_size=embedding.img_size,
            patch_size=embedding.patch_size,
            hidden_size=self._backbone.embed_dim,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = next(self._backbone.parameters()).dtype
        return dtype

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters as transformers has them."""
        for name, tower in zip(PARTS, self._towers, strict=False):
            begin = f"{name}." if len(self._towers) == len(PARTS) else ""
            own = {each: tensor.detach() for each, tensor in tower.named_parameters()}
            for each, tensor in translate(own, _model_type(tower)).items():
                yield f"{begin}{each}", tensor


def _model_type(tower: Any) -> str:
    """Tell which class of transformers computes the same as a ViT of timm."""
    if getattr(tower, "cls_token", None) is None:
        return "siglip_vision_model"
    if getattr(tower, "reg_token", None) is not None:
        return "dinov2_with_registers"
    return "clip_vision_model" if isinstance(tower.blocks[0].ls1, nn.Identity) else "dinov2"


def given(pixel_values: Tensor, made_of: Mapping[str, Any]) -> Tensor:
    """Return what the backbone takes for an engine's pixels (B, 3, S, S): for a pair (B, 6, S, S), the first's before.

    ``made_of`` is the vision config in the bundle.
    """
    if made_of.get("model_type") != PAIR:
        return pixel_values
    return torch.cat([_of_first(pixel_values, made_of), pixel_values], dim=1)


def taken(pixel_values: Tensor, made_of: Mapping[str, Any]) -> Tensor:
    """Return the engine's pixels (B, 3, S, S) of those that the backbone is given.

    Raises InputError unless the six channels for a pair are one picture, normalised for each of its towers.
    """
    if made_of.get("model_type") != PAIR:
        return pixel_values
    if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4 or pixel_values.shape[1] != 2 * CHANNELS:
        shape = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise InputError(f"pixel_values is {shape}; two towers expect (B, 6, S, S), one picture for each.")
    first, second = pixel_values[:, :CHANNELS], pixel_values[:, CHANNELS:]
    off = float((first - _of_first(second, made_of)).abs().max())
    if not off <= max(1e-5, 4 * torch.finfo(pixel_values.dtype).eps):  # pixels are at most 3; catches NaN too
        raise InputError(
            f"the first three channels of pixel_values are not the picture in the last three (off by {off:.2g}): the "
            "installed engine reads only those, and expects one picture, normalised for each of the two towers."
        )
    return second


def _of_first(pixel_values: Tensor, made_of: Mapping[str, Any]) -> Tensor:
    """Normalise pixels of the second tower as those of the first."""
    (mean, other_mean), (std, other_std) = (
        torch.tensor(made_of[name], dtype=torch.float64) for name in ("image_means", "image_stds")
    )
    factor, summand = other_std / std, (other_mean - mean) / std
    wide = pixel_values.float() * _channels(factor, pixel_values) + _channels(summand, pixel_values)
    return wide.to(pixel_values.dtype)


def _channels(numbers: Tensor, pixel_values: Tensor) -> Tensor:
    return numbers.to(pixel_values.device, torch.float32).reshape(-1, 1, 1)
