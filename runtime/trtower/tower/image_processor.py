"""Turn pictures into ``pixel_values`` as Hugging Face's PIL image processors do, without transformers.

The arithmetic is theirs to the bit, in float64 where they use float64: a tower certified with one processor
must not get other pixels from another. Transparency is composited on white, as in transformers 5.23; 4.57
dropped the alpha channel.

Shapes: C channels, H x W pixels, B images.
"""

import json
import logging
import math
import os
from collections.abc import Container, Mapping, Sequence
from copy import copy, deepcopy
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trtower.bundle.manifest import MANIFEST, PREPROCESSOR
from trtower.errors import ConfigError, InputError
from trtower.tower.camera import PADDINGS, prepare_frame
from trtower.tower.dicts import BatchFeature, Size
from trtower.tower.pictures import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    FORMATS,
    Array,
    Images,
    channels_first,
    flatten,
    oriented,
)

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

MAX_RESIZED_PIXELS = 2**24
"""Limit on resizing by the shortest edge: without it 1000 x 1 pixels would become 224000 x 224 and take 1 GB."""

_CLIP: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "data_format": CHANNELS_FIRST,
    "resize_with_pad": None,
    "crop_like": None,
}
_SIGLIP = _CLIP | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "crop_size": None,  # means `size`: VILA and LLaVA-NeXT read the final size here, cropped or not
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_OF_CAMERAS = _SIGLIP | {"resample": 2, "resize_with_pad": "lerobot"}
_DEFAULTS = {"CLIPImageProcessor": _CLIP, "BitImageProcessor": _CLIP, "SiglipImageProcessor": _SIGLIP}
_DEFAULTS |= {"ResizeWithPadImageProcessor": _OF_CAMERAS}  # of robot policies; transformers does not have it
_CHOICES: dict[str, tuple[str, Container[Any]]] = {
    "data_format": (" or ".join(map(repr, FORMATS[:2])), FORMATS[:2]),
    "resample": ("a Pillow filter, 0 to 5", range(6)),
    "resize_with_pad": (f"None or {', '.join(PADDINGS)}", (None, *PADDINGS)),
    "crop_like": ("None or 'torchvision'", (None, "torchvision")),  # of timm, OpenCLIP and Prismatic
}
# Keys that transformers also writes: names, and settings of padding, GPUs and token counts. They change no pixel here.
_INERT = {"_valid_processor_keys", "feature_extractor_type", "image_processor_type", "processor_class"}
_INERT |= {"device", "disable_grouping", "image_seq_length", "pad_size", "size_divisor"}


class ImageProcessor:
    """The CLIP, BiT or SigLIP processor that a ``preprocessor_config.json`` describes.

    The attributes are named like the config's keys. They may be changed: each call reads and checks them again.

    Args:
        config: The settings; a key that is absent or None has the default of its processor in transformers.

    Raises:
        ConfigError: If a setting is invalid, or asks for a step that this class does not have.
    """

    image_processor_type: str
    do_convert_rgb: bool
    do_resize: bool
    size: Size
    resample: int
    do_center_crop: bool
    crop_size: Size
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Sequence[float] | float
    image_std: Sequence[float] | float
    data_format: str
    resize_with_pad: str | None
    crop_like: str | None
    _warned: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor"
        plain_kind = str(kind).removesuffix("Fast").removesuffix("Pil")
        self.image_processor_type = plain_kind.replace("FeatureExtractor", "ImageProcessor")
        if self.image_processor_type not in _DEFAULTS:
            raise ConfigError(f"unknown image_processor_type={kind!r}; choose {', '.join(_DEFAULTS)}.")
        present = {name: value for name, value in config.items() if value is not None}
        for name, value in present.items():
            if not (value is False or name in _CLIP or name in _INERT):
                raise ConfigError(f"ImageProcessor does not support {name}={value!r}; use transformers' own processor.")
        settings = _DEFAULTS[self.image_processor_type] | present
        if settings["crop_size"] is None:
            settings["crop_size"] = settings["size"]
        for name in _CLIP:
            setattr(self, name, _checked(name, settings[name]))

    @classmethod
    def from_file(cls, path: Path) -> "ImageProcessor":
        """Read a ``preprocessor_config.json``.

        Args:
            path: The file.

        Returns:
            The processor that the file describes.

        Raises:
            ConfigError: If the file is not a readable JSON object, or describes another processor.
        """
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise ConfigError(f"{path} cannot be read as JSON: {err}") from err
        if not isinstance(config, dict):
            raise ConfigError(f"{path} holds a JSON {type(config).__name__}; expected an object.")
        return cls(config)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, from which this class and transformers make the same processor.

        Returns:
            A dict that can be written as JSON.
        """
        settings = {name: deepcopy(getattr(self, name)) for name in ("image_processor_type", *_CLIP)}
        return {name: value for name, value in settings.items() if value is not None}

    def preparing_floats(self) -> "ImageProcessor":
        """Return the processor of prepared floats for a bundle that takes bytes.

        Returns:
            A processor for the same pixels, which also rescales and normalises them, as (C, H, W).
        """
        return ImageProcessor(
            self.to_dict() | {"do_rescale": True, "do_normalize": True, "data_format": CHANNELS_FIRST}
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> list[str]:
        """Write `preprocessor_config.json`, which this class and transformers can read.

        A bundle keeps its own file, because its manifest records it. A warning names the settings that differ.

        Args:
            save_directory: The folder, which is made if it does not exist.
            **_: Other arguments of transformers' method, which are ignored.

        Returns:
            A list with the path of the file.
        """
        path = Path(save_directory) / PREPROCESSOR
        if (path.parent / MANIFEST).is_file():
            kept = ImageProcessor.from_file(path).to_dict()
            if changed := [name for name, value in self.to_dict().items() if value != kept[name]]:
                logger.warning("%s belongs to a bundle and is kept; changes not saved: %s.", path, ", ".join(changed))
            return [str(path)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return [str(path)]

    def __repr__(self) -> str:
        return f"ImageProcessor(size={self.size}, crop_size={self.crop_size if self.do_center_crop else None})"

    def preprocess(
        self,
        images: Images,
        return_tensors: str | None = None,
        *,
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Turn pictures into ``pixel_values``.

        Args:
            images: PIL images, arrays or tensors, or lists or iterators of these. Arrays and tensors are (C, H, W) or
                (H, W, C), or batches of these, with values from 0 to 255. For values from 0 to 1, pass
                ``do_rescale=False``.
            return_tensors: None for a list of (C, H, W) arrays; "np" or "pt" for one (B, C, H, W) array or tensor. With
                ``data_format="channels_last"`` C comes last.
            input_data_format: "channels_first", "channels_last", or "none" for greyscale arrays (H, W). None looks for
                the side of 1, 3 or 4.
            overrides: Values of attributes for this call. None keeps the attribute's value.

        Returns:
            A dict with ``pixel_values``, which is also an attribute.

        Raises:
            InputError: If a picture cannot be read, is ambiguous, or holds values outside 0 to 255. With
                ``return_tensors`` also if there are no pictures, or if they come out in several shapes.
            ConfigError: If an argument is unknown or invalid.
        """
        for name, value, choices in (
            ("return_tensors", return_tensors, ("np", "pt")),
            ("input_data_format", input_data_format, FORMATS),
        ):
            if value is not None and value not in choices:
                raise ConfigError(f"unknown {name}={value!r}; choose None or {', '.join(map(repr, choices))}.")
        if unknown := overrides.keys() - _CLIP:
            raise ConfigError(f"unknown setting {min(unknown)!r}; choose {', '.join(_CLIP)}.")
        call = copy(self)
        for name in _CLIP:
            value = overrides.get(name)
            setattr(call, name, _checked(name, getattr(self, name) if value is None else value))
        pixels = [call._pixels(*named, input_data_format) for named in flatten(images, input_data_format)]
        self._warned = call._warned
        return BatchFeature(pixel_values=_stacked(pixels, return_tensors) if return_tensors else pixels)

    __call__ = preprocess

    def _pixels(self, name: str, picture: "Image | Array", input_data_format: str | None) -> Array:
        try:
            if self.resize_with_pad and isinstance(picture, np.ndarray):
                original = oriented(picture, input_data_format)  # neither alpha nor grey: depth would become colour
            else:
                original = channels_first(picture, rgb=self.do_convert_rgb, input_data_format=input_data_format)
            pixels = self._of_camera(original) if self.resize_with_pad else self._of_picture(original)
            if self.data_format == CHANNELS_LAST:
                pixels = np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
        except InputError as err:
            raise InputError(f"{name}: {err}") from err
        if not self.resize_with_pad:
            self._warn_of_range(name, original)
        return pixels

    def _of_picture(self, pixels: Array) -> Array:
        """Do what transformers' processors do, step by step."""
        if self.do_resize:
            pixels = _resize(pixels, self.size, self.resample)
        if self.do_center_crop:
            pixels = _center_crop(pixels, self.crop_size, rounds=self.crop_like is not None)
        if self.do_rescale:
            pixels = _scale(pixels, self.rescale_factor)
        return _normalize(pixels, self.image_mean, self.image_std) if self.do_normalize else pixels

    def _of_camera(self, frame: Array) -> Array:
        """Do what a robot policy does with a frame, whose type says its range."""
        sides = set(self.size.values())
        if len(sides) != 1 or "shortest_edge" in self.size:
            raise ConfigError(f"size={dict(self.size)}; resize_with_pad={self.resize_with_pad!r} makes squares.")
        return prepare_frame(
            frame,
            PADDINGS[str(self.resize_with_pad)],
            sides.pop() if self.do_resize else None,
            scale=partial(_scale, factor=self.rescale_factor) if self.do_rescale else None,
            normalize=partial(_normalize, mean=self.image_mean, std=self.image_std) if self.do_normalize else None,
        )

    def _warn_of_range(self, name: str, pixels: Array) -> None:
        """Warn about values that the settings scale twice or not at all, once per advice."""
        if self.do_rescale and pixels.dtype != np.uint8 and 0 < pixels.max() <= 1:
            expected, advice = "0 to 255", "do_rescale=False"
        elif not self.do_rescale and self.do_normalize and np.max(self.image_mean) <= 1 < pixels.max():
            expected, advice = "0 to 1", "do_rescale=True"
        else:
            return
        if advice not in self._warned:
            self._warned += (advice,)
            logger.warning(
                "%s holds values from %s to %s; do_rescale=%s expects %s. Pass %s for such values.",
                *(name, pixels.min(), pixels.max(), self.do_rescale, expected, advice),
            )


def _checked(name: str, value: Any) -> Any:
    """Return a copy of ``value`` in the form that the steps read; raise ConfigError if it is invalid."""
    if name.startswith("do_"):
        expected, valid = "True or False", isinstance(value, bool)
    elif name in _CHOICES:
        expected, choices = _CHOICES[name]
        valid = isinstance(value, int | str | None) and not isinstance(value, bool) and value in choices
    elif name == "rescale_factor":
        expected, valid = "a finite number", _is_number(value)
    elif name in ("image_mean", "image_std"):
        expected = "a finite number, or one per channel" + (", none of them 0" if name == "image_std" else "")
        numbers = value if isinstance(value, list | tuple) and value else [value]
        valid = all(_is_number(number) and (number != 0 or name == "image_mean") for number in numbers)
    else:
        expected, forms = "n or {'height': n, 'width': n} in whole pixels", [{"height", "width"}]
        if name == "size":
            expected, forms = f"{{'shortest_edge': n}} or {expected}", [*forms, {"shortest_edge"}]
        if isinstance(value, list | tuple) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        elif isinstance(value, int):
            value = {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
        valid = isinstance(value, dict) and set(value.keys()) in forms
        valid = valid and all(type(side) is int and side > 0 for side in value.values())
        value = Size(value) if valid else value
    if not valid:
        raise ConfigError(f"{name}={value!r} is invalid; expected {expected}.")
    return deepcopy(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _stacked(pixels: list[Array], return_tensors: str) -> "Array | torch.Tensor":
    shapes = sorted({array.shape for array in pixels})
    if not shapes:
        raise InputError("images is empty; pass at least one picture.")
    if len(shapes) != 1:
        raise InputError(
            f"images come out as {', '.join(map(str, shapes))}; return_tensors={return_tensors!r} needs one shape. "
            "Set do_center_crop=True or a fixed size, or leave return_tensors out."
        )
    batch = np.stack(pixels)
    return torch.from_numpy(batch) if return_tensors == "pt" else batch


def _resize(image: Array, size: Mapping[str, int], resample: int) -> Array:
    """Resize (C, H, W) with Pillow in 8 bits; fractions from 0 to 1 are scaled to 0 to 255 and back, as float32."""
    from PIL import Image

    if "shortest_edge" in size:
        edge, sides = size["shortest_edge"], image.shape[1:]
        longest = max(4, MAX_RESIZED_PIXELS // edge**2)
        if max(sides) > longest * min(sides):
            raise InputError(
                f"{sides[1]} x {sides[0]} pixels; size={dict(size)} accepts sides of at most {longest} to 1: crop it"
            )
        height, width = (int(edge * side / min(sides)) for side in sides)
    else:
        height, width = size["height"], size["width"]
    whole = image.dtype == np.uint8 or np.allclose(image, image.astype(int))
    if not whole and image.max() > 1:
        raise InputError(
            f"fractions of {image.dtype} from {image.min()} to {image.max()}; resizing accepts fractions from 0 to 1, "
            "or whole numbers: array.round()"
        )
    pixels = np.moveaxis(image if whole else _scale(image, 255), 0, -1).astype(np.uint8)  # (H, W, C)
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    resized = np.array(picture.resize((width, height), resample)).reshape(height, width, -1)
    resized = np.moveaxis(resized, -1, 0)
    return resized if whole else _scale(resized, 1 / 255)


def _center_crop(image: Array, size: Mapping[str, int], *, rounds: bool) -> Array:
    """Crop the centre of (C, H, W); pad a side that is too short with zeros, the odd row first.

    transformers leaves out the larger half after the crop; torchvision ``rounds`` half of what it leaves out to even,
    and pads the odd row last.
    """
    height, width = size["height"], size["width"]
    beside = image.shape[1] - height, image.shape[2] - width
    top, left = ((round(both / 2) if both > 0 else -(-both // 2)) if rounds else both // 2 for both in beside)
    cut = image[:, max(top, 0) :, max(left, 0) :][:, :height, :width]
    canvas = np.zeros((len(image), height, width), image.dtype)
    canvas[:, max(-top, 0) :, max(-left, 0) :][:, : cut.shape[1], : cut.shape[2]] = cut
    return canvas


def _scale(image: Array, factor: float) -> Array:
    """Multiply in float64 and return float32, without allocating a float64 array."""
    scaled = np.empty_like(image, dtype=np.float32)
    return np.multiply(image, float(factor), out=scaled, dtype=np.float64, casting="same_kind")


def _normalize(image: Array, mean: Sequence[float] | float, std: Sequence[float] | float) -> Array:
    """Subtract the mean and divide by the std per channel, in the image's own float type, else in float32."""
    pixels = image if np.issubdtype(image.dtype, np.floating) else image.astype(np.float32)
    middle, spread = (np.array(values, pixels.dtype).reshape(-1, 1, 1) for values in (mean, std))
    for name, values in (("image_mean", middle), ("image_std", spread)):
        if len(values) not in (1, len(pixels)):
            raise InputError(f"it has {len(pixels)} channels, {name} has {len(values)}; set do_convert_rgb=True.")
    normalized = pixels - middle
    normalized /= spread
    return normalized
