"""The towers of OpenVLA and Prismatic, which are timm's, seen as a vision model of transformers.

A checkpoint brings the file of its class along, so the class is known by its name. It returns the patches of the
second-last block, of one tower or of two side by side. That of OpenVLA-OFT may take several pictures at a time.

Shapes: B observations, C pictures of each, S pixels per side, N patches, D features per token.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trtower.errors import InputError
from trtower.timm_names import translate

CLASS = "PrismaticVisionBackbone"
CONDITIONED = "FiLMedPrismaticVisionBackbone"
"""What OpenVLA-OFT puts around it to condition its blocks on the text."""

PARTS = ("featurizer", "fused_featurizer")
PAIR = "prismatic_fused"
SECOND_LAST = -2
CHANNELS = 3
ROUNDED = 0.032
"""How far apart the two forms of a picture may be: two levels of a byte. BF16 rounds by half as much, FP32 by 1e-6."""


def is_prismatic(module: nn.Module) -> bool:
    """Whether a module is the vision backbone of OpenVLA or Prismatic, or its stand-in."""
    if not any(each.__name__ == CLASS for each in type(module).__mro__):
        return False
    return "installation" in vars(module) or hasattr(getattr(module, PARTS[0], None), "patch_embed")


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


def pictures_of(module: nn.Module) -> int:
    """Return C, the number of pictures that a tower takes at a time."""
    return int(getattr(module, "num_images_in_input", 1)) if is_prismatic(module) else 1


def for_backbone(pixel_values: Tensor, made_of: Mapping[str, Any], pictures: int) -> Tensor:
    """Return what a tower takes for an engine's pixels (B, 3, S, S).

    For a pair that is (B, 6 * C, S, S): the picture as the first tower needs it, then as the second, ``pictures`` times
    over. ``made_of`` is the vision config in the bundle.
    """
    if made_of.get("model_type") != PAIR:
        return pixel_values
    return torch.cat([_of_first(pixel_values, made_of), pixel_values] * pictures, dim=1)


def for_engine(pixel_values: Tensor, made_of: Mapping[str, Any], pictures: int) -> Tensor:
    """Return the engine's pixels (B * C, 3, S, S) of those that a tower is given.

    Raises InputError unless each six channels for a pair are one picture, normalised for each of its towers.
    """
    if made_of.get("model_type") != PAIR:
        return pixel_values
    row = (2 * CHANNELS * pictures, made_of["image_size"], made_of["image_size"])
    if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4 or pixel_values.shape[1:] != row:
        shape = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        expected = ", ".join(map(str, row))
        raise InputError(f"pixel_values is {shape}; two towers expect (B, {expected}), each picture for both.")
    if not pixel_values.is_floating_point():
        raise InputError(f"pixel_values is {pixel_values.dtype}; expected pictures that are normalised for each tower.")
    pixel_values = pixel_values.reshape(-1, 2 * CHANNELS, *pixel_values.shape[2:])
    first, second = pixel_values[:, :CHANNELS], pixel_values[:, CHANNELS:]
    if not pixel_values.numel():
        return second  # which the tower refuses
    off = float((first - _of_first(second, made_of)).abs().max())
    if not math.isfinite(off):
        raise InputError("pixel_values holds NaN or infinity.")
    if off > ROUNDED:
        raise InputError(
            f"the first three channels of pixel_values are not the picture in the last three (off by {off:.2g}): the "
            "installed engine reads only those, and expects one picture, normalised for each of the two towers."
        )
    return second


def _of_first(pixel_values: Tensor, made_of: Mapping[str, Any]) -> Tensor:
    """Normalise pixels of the second tower as those of the first."""
    means, stds = (tuple(map(tuple, made_of[name])) for name in ("image_means", "image_stds"))
    factor, summand = _numbers_on(pixel_values.device, means, stds)
    return (pixel_values.float() * factor + summand).to(pixel_values.dtype)


@lru_cache(maxsize=8)
def _numbers_on(device: torch.device, means: Any, stds: Any) -> tuple[Tensor, Tensor]:
    """Return `normalised_again` on a device, where every call of an installed tower needs it."""
    factor, summand = normalised_again(means, stds)
    return factor.to(device), summand.to(device)


def normalised_again(means: Any, stds: Any) -> tuple[Tensor, Tensor]:
    """Return the factor and the summand (3, 1, 1) that turn pixels of the second tower into those of the first.

    ``means`` and ``stds`` have three numbers for each tower.
    """
    (mean, other_mean), (std, other_std) = (torch.tensor(each, dtype=torch.float64) for each in (means, stds))
    numbers = (other_std / std, (other_mean - mean) / std)
    factor, summand = (each.float().reshape(-1, 1, 1) for each in numbers)
    return factor, summand
