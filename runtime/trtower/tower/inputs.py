"""What a call of a tower is given: images in any form that model code passes, and memory for the features.

Shapes: B images, T tiles of one, S pixels a side.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from trtower.errors import InputError

PREPARE = "Prepare pictures: tower(tower.image_processor(pictures, return_tensors='pt')['pixel_values'])."
"""The call that turns pictures into features, for whoever passes something else."""


def one_input(images: Any, pixel_values: Any) -> Any:
    """Return what was passed as images, as pixel_values, or in what an image processor returned; else InputError."""
    if (images is None) == (pixel_values is None):
        how_many = "neither" if images is None else "both"
        raise InputError(f"{how_many} of images and pixel_values was passed; one is expected. {PREPARE}")
    if not isinstance(images, Mapping):
        return pixel_values if images is None else images
    if set(images.keys()) != {"pixel_values"}:
        raise InputError(
            f"images holds {', '.join(map(str, images.keys())) or 'nothing'}; a tower takes pixel_values and "
            "nothing else: tower(inputs['pixel_values'])."
        )
    return images["pixel_values"]


def check_images(
    images: Any, name: str, *, dims: tuple[int, ...], fits: Callable[[torch.Size], bool], expected: Callable[[], str]
) -> None:
    """Raise InputError unless ``images`` is a tensor of numbers, of that many dimensions, whose (C, H, W) ``fits``."""
    if not isinstance(images, torch.Tensor):
        shape = f" of shape {tuple(images.shape)}" if hasattr(images, "shape") else ""
        raise InputError(
            f"{name} is a {type(images).__name__}{shape}; a torch.Tensor or a list of them is expected. {PREPARE}"
        )
    if images.ndim in (3, 4) and not images.is_floating_point() and images.shape[-1] in (1, 3, 4):
        raise InputError(
            f"{name} has shape {tuple(images.shape)} and dtype {images.dtype}, as a picture has. {PREPARE}"
        )
    if images.ndim not in dims or 0 in images.shape or not fits(images.shape[-3:]):
        raise InputError(f"{name} has shape {tuple(images.shape)}; this engine takes {expected()}.")
    if not images.is_floating_point():
        raise InputError(f"{name} has dtype {images.dtype}; floating-point numbers are expected. {PREPARE}")
    if images.is_meta:
        raise InputError(f"{name} is on the meta device, which holds no pixels.")
    if images.layout != torch.strided:
        raise InputError(f"{name} has layout {images.layout}; a dense tensor is expected: pass images.to_dense().")


def check_out(out: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise InputError unless features of this shape can be written into ``out``."""
    if not isinstance(out, torch.Tensor) or (tuple(out.shape), out.device) != (shape, device):
        found = (
            f"{tuple(out.shape)} on {out.device}" if isinstance(out, torch.Tensor) else f"of type {type(out).__name__}"
        )
        raise InputError(f"out is {found}; {shape} on {device} is expected.")
    if not out.is_floating_point():
        raise InputError(f"out has dtype {out.dtype}; features are floating-point numbers.")


def can_fill(out: torch.Tensor, pixel_values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether an engine of this dtype may write into ``out``, and does not read there."""
    apart = out.untyped_storage().data_ptr() != pixel_values.untyped_storage().data_ptr()
    return out.dtype == dtype and out.is_contiguous() and apart
