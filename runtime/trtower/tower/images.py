"""Pack images of any form into one batch for an engine, and return the features in the same form.

Shapes: B images, T tiles per image, S pixels per side, P prefix tokens, N patches, D features per token (see spec.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtower.bundle.manifest import Manifest
from trtower.errors import InputError
from trtower.runners.base import Runner
from trtower.tower.pick import Pick

PREPARE = "Prepare pictures: tower(tower.image_processor(pictures, return_tensors='pt')['pixel_values'])."
"""The call that turns pictures into features; errors about other inputs quote it."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Images packed into one batch (B, 3, S, S) for an engine; ``images[i]`` fills ``counts[i]`` of its rows.

    ``in_list``: whether they were passed as a list instead of one tensor.
    """

    pixel_values: torch.Tensor
    images: Sequence[torch.Tensor]
    counts: list[int]
    in_list: bool


class Images:
    """Packs images (3, S, S) and tiles (T, 3, S, S) for the engine of a bundle, and unpacks their features."""

    def __init__(self, manifest: Manifest) -> None:
        self.spec, self._min_batch = manifest.spec, manifest.batch.min
        self._shape = torch.Size(manifest.input.row)

    def pack(self, images: Any, runner: Runner) -> Packed:
        """Pack a tensor or a list of tensors into one batch; raise InputError if it is neither, or malformed."""
        in_list = isinstance(images, (list, tuple))
        if in_list and not images:
            raise InputError("images is an empty list; expected at least one image.")
        images = images if in_list else [images]
        for index, image in enumerate(images):
            self.check(image, f"images[{index}]" if in_list else "images", in_list=in_list)
        counts, pixel_values = self._batch(images, runner)
        return Packed(pixel_values=pixel_values, images=images, counts=counts, in_list=in_list)

    def find_destination(self, out: Any, packed: Packed, pick: Pick, runner: Runner) -> torch.Tensor | None:
        """Return ``out`` as the engine's output if that can be written there directly; else None.

        Raises InputError if the features of ``packed`` do not fit ``out``.
        """
        if out is None:
            return None
        if packed.in_list:
            raise InputError("out needs one tensor, but images is a list. Stack the images, or do not pass out.")
        check_out(out, (*packed.images[0].shape[:-3], *self.feature_row(pick)), runner.device)
        shares_memory = out.untyped_storage().data_ptr() == packed.pixel_values.untyped_storage().data_ptr()
        if shares_memory or not (pick.whole and out.is_contiguous() and out.dtype == runner.dtype):
            return None
        rows = out.view(-1, *pick.row)
        return rows if len(rows) == len(packed.pixel_values) else None

    def unpack(
        self, packed: Packed, features: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Return the features (B, N, D) of a batch in the form and dtype of its images, or in ``out``."""
        parts = zip(features.split(packed.counts), packed.images, strict=True)
        each = [self._merge(part, image.dtype) for part, image in parts]
        if packed.in_list:
            return [self._as(part, image) for part, image in zip(each, packed.images, strict=True)]
        (features,), (images,) = each, packed.images
        features = features if images.ndim == 4 else features.unflatten(0, images.shape[:2])
        if out is None:
            return self._as(features, images)
        return out if (features.data_ptr(), features.shape) == (out.data_ptr(), out.shape) else out.copy_(features)

    def _batch(self, images: Sequence[torch.Tensor], runner: Runner) -> tuple[list[int], torch.Tensor]:
        """Return how many rows each image (..., 3, S, S) fills, and the batch of all rows."""
        counts = [image.shape[:-3].numel() for image in images]
        if len(images) > 1:
            return counts, self._copy(images, sum(counts), runner)
        (image,) = images
        pixel_values = image.to(runner.device, runner.pixel_dtype, memory_format=torch.contiguous_format).contiguous()
        return counts, pixel_values.view(-1, *image.shape[-3:])

    def _copy(self, images: Iterable[torch.Tensor], total: int, runner: Runner) -> torch.Tensor:
        """Copy images (3, S, S) and tiles (T, 3, S, S), ``total`` in all, into one batch on the engine's device."""
        pixel_values = torch.empty((total, *self._shape), dtype=runner.pixel_dtype, device=runner.device)
        start = 0
        for image in images:
            stop = start + image.shape[:-3].numel()
            pixel_values[start:stop] = image
            start = stop
        return pixel_values

    def _as(self, features: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Cast features to the dtype of their images, as the eager tower does; bytes have none to offer."""
        return features.to(images.dtype) if self.spec.takes_floats else features

    def _merge(self, features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Merge the rows of one input, whose images have ``dtype``, into one per image. Here each row is an image."""
        return features

    def feature_row(self, pick: Pick) -> tuple[int, ...]:
        """Return the shape of one image's features: (N, D), or (D,) for an embedding."""
        return pick.row

    def check(self, images: Any, name: str, *, in_list: bool) -> None:
        """Raise InputError unless ``images`` is a tensor of pixels in a shape that a call, or a list item, may have."""
        if not isinstance(images, torch.Tensor):
            shape = f" of shape {tuple(images.shape)}" if hasattr(images, "shape") else ""
            raise InputError(
                f"{name} is a {type(images).__name__}{shape}; expected a torch.Tensor or a list of them. {PREPARE}"
            )
        if self.spec.takes_floats:
            _refuse_raw(images, name)
        else:
            self._check_dtype(images, name)  # before the shape: floats also have another one
        dims = (3, 4) if in_list else (4, 5)
        if images.ndim not in dims or 0 in images.shape or not self._fits(images.shape[-3:]):
            expected = self._expectation(in_list=in_list)
            turn = self._how_to_turn(images, name)
            raise InputError(f"{name} has shape {tuple(images.shape)}; this engine accepts {expected}.{turn}")
        self._check_dtype(images, name)
        if images.is_meta:
            raise InputError(f"{name} is on the meta device, which holds no pixels; pass a tensor with data.")
        if images.layout != torch.strided:
            raise InputError(f"{name} has layout {images.layout}; expected a dense tensor: pass images.to_dense().")

    def _how_to_turn(self, images: torch.Tensor, name: str) -> str:
        """Say how to move the channels to where the engine expects them, if that is all that is wrong."""
        moves = ((-3, -1), (-1, -3)) if images.ndim > 2 else ()
        fitting = [move for move in moves if self._fits(images.movedim(*move).shape[-3:])]
        return f" Turn them: {name}.movedim{fitting[0]}." if fitting else ""

    def _fits(self, shape: torch.Size) -> bool:
        return shape == self._shape

    def _check_dtype(self, images: torch.Tensor, name: str) -> None:
        """Raise InputError, which names the kind of the bundle, for floats where it takes bytes, and the reverse."""
        if self.spec.takes_floats and not images.is_floating_point():
            raise InputError(
                f"{name} has dtype {images.dtype}; expected floating-point numbers: this bundle takes prepared floats. "
                f"For bytes, export it with --pixels uint8. {PREPARE}"
            )
        if not self.spec.takes_floats and images.dtype != torch.uint8:
            raise InputError(
                f"{name} has dtype {images.dtype}; expected torch.uint8: this bundle takes bytes, and rescales and "
                f"normalises them itself. For prepared floats, export it without --pixels uint8. {PREPARE}"
            )

    def _expectation(self, *, in_list: bool) -> str:
        image = ", ".join(map(str, self._shape))
        if in_list:
            return f"({image}) or tiles (T, {image}) in a list"
        minimum = f" with B at least {self._min_batch}," if self._min_batch > 1 else ""
        return f"(B, {image}){minimum} or tiles (B, T, {image})"


def _refuse_raw(images: torch.Tensor, name: str) -> None:
    """Raise InputError for what looks like a picture that nobody prepared."""
    if images.ndim in (3, 4) and not images.is_floating_point() and images.shape[-1] in (1, 3, 4):
        raise InputError(
            f"{name} has shape {tuple(images.shape)} and dtype {images.dtype}, like a raw picture, but this bundle "
            f"takes prepared floats. {PREPARE} A bundle of --pixels uint8 takes bytes."
        )


def one_input(images: Any, pixel_values: Any) -> Any:
    """Return the images, passed as images, as pixel_values or as an image processor's output; else raise InputError."""
    if (images is None) == (pixel_values is None):
        passed = "neither images nor pixel_values" if images is None else "both images and pixel_values"
        raise InputError(f"got {passed}; expected exactly one. {PREPARE}")
    if not isinstance(images, Mapping):
        return pixel_values if images is None else images
    if set(images.keys()) != {"pixel_values"}:
        raise InputError(
            f"images holds {', '.join(map(str, images.keys())) or 'nothing'}; a tower accepts only "
            "pixel_values: tower(inputs['pixel_values'])."
        )
    return images["pixel_values"]


def check_out(out: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise InputError unless features of this shape can be written into ``out``."""
    if not isinstance(out, torch.Tensor) or (tuple(out.shape), out.device) != (shape, device):
        actual = (
            f"{tuple(out.shape)} on {out.device}" if isinstance(out, torch.Tensor) else f"of type {type(out).__name__}"
        )
        raise InputError(f"out is {actual}; expected {shape} on {device}.")
    if not out.is_floating_point():
        raise InputError(f"out has dtype {out.dtype}; expected a floating-point dtype.")
