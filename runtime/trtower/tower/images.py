"""Images in any form that model code passes, run together as batches of an engine, and features in the same form.

Shapes: B images, T tiles of one, S pixels a side, P prefix tokens, N patches, D features a token (see spec.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from trtower.bundle.manifest import Manifest
from trtower.errors import InputError
from trtower.runners.base import Runner
from trtower.tower.pick import Pick

PREPARE = "Prepare pictures: tower(tower.image_processor(pictures, return_tensors='pt')['pixel_values'])."
"""The call that turns pictures into features, for whoever passes something else."""

Run = Callable[[Runner, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Turns any number of images (B, 3, S, S), as a runner takes them, into features (B, N, D), and may write these into
its last argument."""


class Images:
    """Images (3, S, S), and tiles (T, 3, S, S) of one, for the engine of a bundle."""

    def __init__(self, manifest: Manifest) -> None:
        self.spec, self._least = manifest.spec, manifest.batch.min

    def encode(
        self, images: Any, out: torch.Tensor | None, runner: Runner, run: Run, pick: Pick
    ) -> torch.Tensor | list[torch.Tensor]:
        """Turn a tensor into one of features, or a list into a list; raise InputError if it is neither, or ill-formed.

        The features of a tensor are written into ``out`` if there is one.
        """
        if not isinstance(images, (list, tuple)):
            self.check(images, "images", in_list=False)
            if out is not None:
                check_out(out, (*images.shape[:-3], *self.feature_shape(pick)), runner.device)
            (features,) = self._run_together([images], runner, run, out)
            features = features if images.ndim == 4 else features.unflatten(0, images.shape[:2])
            if out is None:
                return features
            return out if features.data_ptr() == out.data_ptr() else out.copy_(features)
        if out is not None:
            raise InputError("out is for the features of one tensor, and images is a list.")
        if not images:
            raise InputError("images is an empty list; at least one image is expected.")
        for index, image in enumerate(images):
            self.check(image, f"images[{index}]", in_list=True)
        return self._run_together(images, runner, run, None)

    def _run_together(
        self, images: Sequence[torch.Tensor], runner: Runner, run: Run, out: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Run images (..., 3, S, S) of one or several ranks, and return (T, N, D) for the T in each.

        For ``out`` they are in the engine's dtype, and already there if they can be.
        """
        if len(images) == 1:
            image = images[0]
            pixel_values = image.to(runner.device, runner.dtype, memory_format=torch.contiguous_format).contiguous()
            features = run(runner, pixel_values.view(-1, *image.shape[-3:]), out)
            return [features.to(image.dtype) if out is None else features]
        counts = [image.shape[:-3].numel() for image in images]
        parts = run(runner, self._pack(images, sum(counts), runner), None).split(counts)
        return [part.to(image.dtype) for part, image in zip(parts, images, strict=True)]

    def _pack(self, images: Iterable[torch.Tensor], total: int, runner: Runner) -> torch.Tensor:
        """Copy images (3, S, S) and (T, 3, S, S), ``total`` in all, into one batch where the engine reads it."""
        side = self.spec.image_size
        pixel_values = torch.empty((total, 3, side, side), dtype=runner.dtype, device=runner.device)
        start = 0
        for image in images:
            stop = start + image.shape[:-3].numel()
            pixel_values[start:stop] = image
            start = stop
        return pixel_values

    def feature_shape(self, pick: Pick) -> tuple[int, int]:
        """Return (N, D), the shape of one image's features."""
        return pick.num_tokens, pick.hidden_size

    def check(self, images: Any, name: str, *, in_list: bool) -> None:
        """Raise InputError unless ``images`` are numbers in a shape that one call, or an item of a list, may have."""
        if not isinstance(images, torch.Tensor):
            shape = f" of shape {tuple(images.shape)}" if hasattr(images, "shape") else ""
            raise InputError(
                f"{name} is a {type(images).__name__}{shape}; a torch.Tensor or a list of them is expected. {PREPARE}"
            )
        if images.ndim in (3, 4) and not images.is_floating_point() and images.shape[-1] in (1, 3, 4):
            raise InputError(
                f"{name} has shape {tuple(images.shape)} and dtype {images.dtype}, as a picture has. {PREPARE}"
            )
        dims = (3, 4) if in_list else (4, 5)
        if images.ndim not in dims or 0 in images.shape or not self._fits(images.shape[-3:]):
            expected = self._expectation(in_list=in_list)
            raise InputError(f"{name} has shape {tuple(images.shape)}; this engine takes {expected}.")
        if not images.is_floating_point():
            raise InputError(f"{name} has dtype {images.dtype}; floating-point numbers are expected. {PREPARE}")
        if images.is_meta:
            raise InputError(f"{name} is on the meta device, which holds no pixels.")
        if images.layout != torch.strided:
            raise InputError(f"{name} has layout {images.layout}; a dense tensor is expected: pass images.to_dense().")

    def _fits(self, shape: torch.Size) -> bool:
        return shape == (3, self.spec.image_size, self.spec.image_size)

    def _expectation(self, *, in_list: bool) -> str:
        image = f"3, {self.spec.image_size}, {self.spec.image_size}"
        if in_list:
            return f"({image}) or tiles (T, {image}) in a list"
        least = f", B {self._least} at least," if self._least > 1 else ""
        return f"(B, {image}){least} or tiles (B, T, {image})"


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
