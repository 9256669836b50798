"""Images to ``pixel_values`` as Hugging Face's PIL image processors make them, without transformers.

The arithmetic is theirs to the bit, float64 where they use float64: a tower certified behind one processor
must not see other pixels behind the next. Transparency is laid on white, as transformers 5.23 does it; 4.57
dropped the alpha channel.

Shapes: C channels, H x W pixels, B images.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from trtower.attribute_dict import AttributeDict
from trtower.bundle import MANIFEST, PREPROCESSOR
from trtower.errors import ConfigError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Array: TypeAlias = npt.NDArray[Any]
Images: TypeAlias = "Image | Array | torch.Tensor | Sequence[Images]"

__all__ = ["BatchFeature", "ImageProcessor", "Size"]

logger = logging.getLogger(__name__)

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
}
_SIGLIP = _CLIP | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "crop_size": None,  # is `size` then: VILA and LLaVA-NeXT read the final size here, cropped or not
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_DEFAULTS = {"CLIPImageProcessor": _CLIP, "BitImageProcessor": _CLIP, "SiglipImageProcessor": _SIGLIP}
# Written by transformers as well: names, and settings of padding, GPUs and token counts, which change no pixel here.
_INERT = {"_valid_processor_keys", "feature_extractor_type", "image_processor_type", "processor_class"}
_INERT |= {"device", "disable_grouping", "image_seq_length", "pad_size", "size_divisor"}


class BatchFeature(AttributeDict):
    """A dict whose keys are also attributes, as model code expects of transformers' class of this name."""

    def to(self, *args: Any, **kwargs: Any) -> "BatchFeature":
        """Move the tensors in place, with the arguments of ``Tensor.to``; a dtype is given to float tensors only."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                moved = value.to(*args, **kwargs)
                self[name] = moved if value.is_floating_point() else value.to(moved.device)
        return self


class Size(dict[str, int]):
    """A size in pixels, {"shortest_edge": n} or {"height": h, "width": w}, which answers in either form and as (h, w).

    LLaVA and LLaVA-NeXT read `size["shortest_edge"]`, `size["height"]`, `size[0]` and `min(size)`, as the processors of
    their own towers have it. Items, equality and JSON are those of the dict as it was written.
    """

    def __missing__(self, key: Any) -> int:
        height, width = self.sides
        answers: dict[Any, int] = {"shortest_edge": min(height, width), "height": height, "width": width}
        answers |= dict(enumerate(self.sides)) | {-1: width, -2: height}
        if key not in answers:
            raise KeyError(key)
        return answers[key]

    def __iter__(self) -> Iterator[Any]:
        """Yield height and width, as the tuple does that SigLIP's processor in LLaVA-NeXT has here."""
        return iter(self.sides)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        edge = self.get("shortest_edge")
        return (self["height"], self["width"]) if edge is None else (edge, edge)

    def resized(self, side: int) -> "Size":
        """Return a size of the same form for square pictures of this side."""
        return Size(dict.fromkeys(self.keys(), side))


class ImageProcessor:
    """The CLIP, BiT or SigLIP processor that a ``preprocessor_config.json`` describes.

    The attributes have the names of the config's keys. They may be changed: each call reads and checks them anew.
    A key that asks for a step this class does not have is a ConfigError.
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

    def __init__(self, config: Mapping[str, Any]) -> None:
        written = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor"
        family = str(written).removesuffix("Fast").removesuffix("Pil")
        self.image_processor_type = family.replace("FeatureExtractor", "ImageProcessor")
        if self.image_processor_type not in _DEFAULTS:
            raise ConfigError(f"image_processor_type={written!r} is not known here; known: {', '.join(_DEFAULTS)}.")
        given = {name: value for name, value in config.items() if value is not None}
        for name, value in given.items():
            off = value is False or (name, value) == ("data_format", "channels_first")
            if not (off or name in _CLIP or name in _INERT):
                raise ConfigError(f"{name}={value!r} asks for what ImageProcessor does not do; use transformers here.")
        settings = _DEFAULTS[self.image_processor_type] | given
        if settings["crop_size"] is None:
            settings["crop_size"] = settings["size"]
        for name in _CLIP:
            setattr(self, name, _checked(name, settings[name]))

    @classmethod
    def from_file(cls, path: Path) -> "ImageProcessor":
        """Read a ``preprocessor_config.json``; ConfigError where that is not a readable JSON object."""
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise ConfigError(f"{path} cannot be read as JSON: {err}") from err
        if not isinstance(config, dict):
            raise ConfigError(f"{path} holds a JSON {type(config).__name__}; a preprocessor config is an object.")
        return cls(config)

    def to_dict(self) -> dict[str, Any]:
        """Return a config that makes this processor again, here and in transformers."""
        return {name: deepcopy(getattr(self, name)) for name in ("image_processor_type", *_CLIP)}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> list[str]:
        """Write `preprocessor_config.json`, here and in transformers a config of this processor; return its path.

        A bundle keeps its own, which its manifest vouches for: settings that differ from it are named in a warning.
        """
        path = Path(save_directory) / PREPROCESSOR
        if (path.parent / MANIFEST).is_file():
            kept = ImageProcessor.from_file(path).to_dict()
            if changed := [name for name, value in self.to_dict().items() if value != kept[name]]:
                logger.warning("%s is a bundle's: it is kept, and %s is not saved.", path, ", ".join(changed))
            return [str(path)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return [str(path)]

    def __repr__(self) -> str:
        return f"ImageProcessor(size={self.size}, crop_size={self.crop_size if self.do_center_crop else None})"

    def preprocess(self, images: Images, return_tensors: str | None = None, **overrides: Any) -> BatchFeature:
        """Make ``pixel_values``: a list of (C, H, W) arrays, or one (B, C, H, W) array ("np") or tensor ("pt").

        Arrays and tensors are (C, H, W) or (H, W, C), or batches of these, and hold 0 to 255; for values from 0 to 1
        pass ``do_rescale=False``. An override is an attribute's value for this call; None leaves the attribute's.
        """
        if return_tensors not in (None, "np", "pt"):
            raise ConfigError(f"return_tensors={return_tensors!r} is not known; give None, 'np' or 'pt'.")
        if unknown := overrides.keys() - _CLIP:
            raise ConfigError(f"{min(unknown)} is not a setting of ImageProcessor; settings: {', '.join(_CLIP)}.")
        call = copy(self)
        for name in _CLIP:
            value = overrides.get(name)
            setattr(call, name, _checked(name, getattr(self, name) if value is None else value))
        pixels = [call._pixels(image) for image in _flat(images)]
        if return_tensors is None:
            return BatchFeature(pixel_values=pixels)
        shapes = sorted({array.shape for array in pixels})
        if len(shapes) != 1:
            found = f"come out as {', '.join(map(str, shapes))}" if shapes else "is empty"
            raise InputError(
                f"images {found}; return_tensors={return_tensors!r} takes one shape. "
                "Set do_center_crop=True or a fixed size, or leave return_tensors out."
            )
        batch = np.stack(pixels)
        return BatchFeature(pixel_values=torch.from_numpy(batch) if return_tensors == "pt" else batch)

    __call__ = preprocess

    def _pixels(self, image: "Image | Array") -> Array:
        pixels = _channels_first(image, rgb=self.do_convert_rgb)  # -> (C, H, W)
        if not pixels.size:
            raise InputError(f"images holds an image without pixels, of shape {pixels.shape}; leave it out.")
        if self.do_resize:
            pixels = _resize(pixels, self.size, self.resample)
        if self.do_center_crop:
            pixels = _center_crop(pixels, self.crop_size)
        if self.do_rescale:
            pixels = _scale(pixels, self.rescale_factor)
        if self.do_normalize:
            pixels = _normalize(pixels, self.image_mean, self.image_std)
        return pixels


def _checked(name: str, value: Any) -> Any:
    """Return a copy of ``value`` in the form the steps read; ConfigError where the setting cannot have it."""
    if name.startswith("do_"):
        expected, valid = "True or False", isinstance(value, bool)
    elif name == "resample":
        expected, valid = "a Pillow filter, 0 to 5", isinstance(value, int) and value in range(6)
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
        raise ConfigError(f"{name}={value!r} cannot be honoured; expected {expected}.")
    return deepcopy(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _flat(images: Images) -> "Iterator[Image | Array]":
    """Yield the single images in an image, a batch of them, or nested lists of either."""
    from PIL.Image import Image

    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().numpy()
    if isinstance(images, Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        yield images
    elif isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4):
        for image in images:
            yield from _flat(image)
    else:
        found = f"an array of shape {images.shape}" if isinstance(images, np.ndarray) else f"a {type(images).__name__}"
        raise InputError(f"images holds {found}; give PIL images, or arrays or tensors of 3 or 4 dimensions.")


def _channels_first(image: "Image | Array", *, rgb: bool) -> Array:
    """Return a new or viewed (C, H, W) array; an array with channels at both ends is taken as (C, H, W)."""
    if not isinstance(image, np.ndarray):
        array = np.array(_rgb(image) if rgb else image)
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    if image.shape[0] not in (1, 3, 4):
        if image.shape[-1] not in (1, 3, 4):
            raise InputError(f"images holds an array of shape {image.shape}; its first or last side must be 1, 3 or 4.")
        image = np.moveaxis(image, -1, 0)
    return _rgb_array(image) if rgb else image


def _rgb(image: "Image") -> "Image":
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _rgb_array(image: Array) -> Array:
    """Repeat one channel, or lay four on white: 255 in an integer array, 1 in a float one, as transformers does."""
    if image.shape[0] == 1:
        return np.repeat(image, 3, axis=0)
    if image.shape[0] == 3:
        return image
    whole = np.issubdtype(image.dtype, np.integer)
    if not whole and (image.min() < 0 or image.max() > 1):
        raise InputError(f"an RGBA image of {image.dtype} spans {image.min()} to {image.max()}; expected 0 to 1.")
    white = 255 if whole else 1.0
    alpha = image[3:] / white
    blend = alpha * image[:3] + (1 - alpha) * white
    return (np.round(blend) if whole else blend).astype(image.dtype)


def _resize(image: Array, size: Mapping[str, int], resample: int) -> Array:
    """Resize (C, H, W) in Pillow, in 8 bits; fractions from 0 to 1 go there as 0 to 255 and come back as float32."""
    from PIL import Image

    if "shortest_edge" in size:
        sides = image.shape[1:]
        height, width = (int(size["shortest_edge"] * side / min(sides)) for side in sides)
    else:
        height, width = size["height"], size["width"]
    whole = image.dtype == np.uint8 or np.allclose(image, image.astype(int))
    top = 255 if whole else 1
    if image.min() < 0 or image.max() > top:
        raise InputError(f"an image of {image.dtype} spans {image.min()} to {image.max()}; resizing takes 0 to {top}.")
    pixels = np.moveaxis(image if whole else _scale(image, 255), 0, -1).astype(np.uint8)  # (H, W, C)
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    resized = np.array(picture.resize((width, height), resample)).reshape(height, width, -1)
    resized = np.moveaxis(resized, -1, 0)
    return resized if whole else _scale(resized, 1 / 255)


def _center_crop(image: Array, size: Mapping[str, int]) -> Array:
    """Cut the middle out of (C, H, W); a side that is too short is padded with zeros, the odd row first."""
    height, width = size["height"], size["width"]
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    cut = image[:, max(top, 0) :, max(left, 0) :][:, :height, :width]
    canvas = np.zeros((len(image), height, width), image.dtype)
    canvas[:, max(-top, 0) :, max(-left, 0) :][:, : cut.shape[1], : cut.shape[2]] = cut
    return canvas


def _scale(image: Array, factor: float) -> Array:
    return (image.astype(np.float64) * factor).astype(np.float32)


def _normalize(image: Array, mean: Sequence[float] | float, std: Sequence[float] | float) -> Array:
    """Subtract and divide per channel, in the image's own float type or in float32."""
    pixels = image if np.issubdtype(image.dtype, np.floating) else image.astype(np.float32)
    middle, spread = (np.array(values, pixels.dtype).reshape(-1, 1, 1) for values in (mean, std))
    for name, values in (("image_mean", middle), ("image_std", spread)):
        if len(values) not in (1, len(pixels)):
            raise InputError(f"an image has {len(pixels)} channels, {name} has {len(values)}; set do_convert_rgb=True.")
    return (pixels - middle) / spread
