"""Read what a caller passes as pictures into (C, H, W) arrays of values from 0 to 255.

What could be read in two ways is refused, never guessed: which value of a 16-bit picture is white, or which side of a
(3, 200, 3) array is the channels. A picture is not turned by its EXIF orientation, as in transformers' PIL processors.

Shapes: C channels, H x W pixels, B images.
"""

from collections.abc import Iterator, Sequence
from io import IOBase
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from trtower.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Array: TypeAlias = npt.NDArray[Any]
Images: TypeAlias = "Image | Array | torch.Tensor | Sequence[Images] | Iterator[Images]"

FORMATS = CHANNELS_FIRST, CHANNELS_LAST, GREY = ("channels_first", "channels_last", "none")
"""The values of ``input_data_format``: (C, H, W), (H, W, C), and (H, W)."""

CHANNELS = (1, 3, 4)

_SCALED = "(np.asarray(picture) / white * 255).clip(0, 255).astype(np.uint8)"
_NOT_OPENED = (
    ((str, PathLike), "PIL.Image.open(path)"),
    ((bytes, bytearray, memoryview), "PIL.Image.open(io.BytesIO(data))"),
    ((IOBase,), "PIL.Image.open(file)"),
)


def flatten(
    images: Images, input_data_format: str | None = None, name: str = "images"
) -> "Iterator[tuple[str, Image | Array]]":
    """Yield each single picture of an image, a batch, or nested lists and iterators of either, after its name.

    The name is its place: "images[3]". InputError if something else than a picture is found.
    """
    from PIL.Image import Image

    if isinstance(images, torch.Tensor):
        images = _to_numpy(images, name)
    dims = 2 if input_data_format == GREY else 3
    if isinstance(images, Image) or (isinstance(images, np.ndarray) and images.ndim == dims):
        yield name, images
    elif isinstance(images, np.ndarray):
        if images.ndim != dims + 1:
            raise InputError(
                f"{name} is an array of shape {images.shape}; expected {dims} dimensions, or {dims + 1} for a batch. "
                f"Pass input_data_format={GREY!r} for greyscale (H, W), and only for that."
            )
        yield from ((f"{name}[{index}]", image) for index, image in enumerate(images))
    elif isinstance(images, list | tuple | Iterator) and not isinstance(images, IOBase):
        for index, image in enumerate(images):
            yield from flatten(image, input_data_format, f"{name}[{index}]")
    else:
        advice = next((f"open it with {call}" for kinds, call in _NOT_OPENED if isinstance(images, kinds)), None)
        advice = advice or "expected PIL images, arrays or tensors, or a list of them"
        raise InputError(f"{name} is {'None' if images is None else f'of type {type(images).__name__}'}; {advice}.")


def channels_first(picture: "Image | Array", *, rgb: bool, input_data_format: str | None = None) -> Array:
    """Return a new or viewed (C, H, W) array of finite values from 0 to 255, with 3 channels if ``rgb``.

    ``input_data_format`` is of arrays only. InputError says what is wrong with the picture, and not which it is.
    """
    array = _oriented(picture, input_data_format) if isinstance(picture, np.ndarray) else _decoded(picture, rgb=rgb)
    array = _checked(array)
    return _rgb_array(array) if rgb else array


def to_rgb(image: "Image") -> "Image":
    """Decode a picture and convert it to RGB, with transparency laid on white.

    InputError if its channels do not have 8 bits; Pillow's own errors if its file is damaged.
    """
    from PIL import Image

    _refuse_deep(image)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow converts La to nothing else
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _refuse_deep(image: "Image") -> None:
    """Raise InputError if a channel has more than 8 bits: Pillow would clip its values at 255, nearly all white."""
    from PIL import ImageMode

    image.load()
    if ImageMode.getmode(image.mode).typestr not in ("|b1", "|u1"):
        raise InputError(
            f"mode {image.mode} is not 8 bits a channel and does not say which value is white; scale it: "
            f"PIL.Image.fromarray({_SCALED})"
        )


def _to_numpy(tensor: torch.Tensor, name: str) -> Array:
    """Copy a tensor of any device to NumPy; bfloat16 and float8, which NumPy does not have, become float32."""
    try:
        if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            tensor = tensor.float()
        return np.asarray(tensor.numpy(force=True))
    except (RuntimeError, TypeError) as err:
        raise InputError(
            f"{name} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}, which NumPy cannot read; "
            "expected a dense one that holds values: pass tensor.to_dense(), or tensor.dequantize()."
        ) from err


def _oriented(array: Array, input_data_format: str | None) -> Array:
    if input_data_format == GREY:
        return array[None]
    sides = {CHANNELS_FIRST: array.shape[0], CHANNELS_LAST: array.shape[-1]}
    fitting = [name for name, side in sides.items() if side in CHANNELS and input_data_format in (None, name)]
    if len(fitting) == 2:
        raise InputError(
            f"shape {array.shape} has channels first or last; pass input_data_format={CHANNELS_FIRST!r} or "
            f"{CHANNELS_LAST!r}"
        )
    if not fitting:
        where = {None: "first or last", CHANNELS_FIRST: "first", CHANNELS_LAST: "last"}[input_data_format]
        raise InputError(f"shape {array.shape} has no channels; expected a {where} side of 1, 3 or 4")
    return array if fitting == [CHANNELS_FIRST] else np.moveaxis(array, -1, 0)


def _decoded(image: "Image", *, rgb: bool) -> Array:
    try:
        array = np.array(to_rgb(image) if rgb else _unconverted(image))
    except (InputError, MemoryError):
        raise
    except Exception as err:  # a damaged file has Pillow's decoders raise nearly anything
        raise InputError(
            f"Pillow cannot decode it ({type(err).__name__}: {err}); replace the file, or keep it open until here"
        ) from err
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _unconverted(image: "Image") -> "Image":
    _refuse_deep(image)
    if image.mode in ("1", "P", "PA"):
        raise InputError(f"mode {image.mode} holds bits or places in a palette; set do_convert_rgb=True")
    return image


def _checked(array: Array) -> Array:
    """Return a plain array in the machine's byte order, or raise InputError if its values are not those of pixels."""
    if not array.size:
        raise InputError(f"an image without pixels, of shape {array.shape}; leave it out")
    if array.dtype.kind == "b":
        raise InputError("values of dtype bool, where True may be 1 or 255; pass array * np.uint8(255) for white")
    if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
        raise InputError(f"values of dtype {array.dtype}; expected integers or floats of at most 64 bits")
    if np.ma.is_masked(array):
        raise InputError("values that are masked; fill them: array.filled(0)")
    array = np.asarray(array, array.dtype.newbyteorder("="))
    if array.dtype != np.uint8:
        low, high = array.min(), array.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError("values that are NaN or infinite; replace them: np.nan_to_num(array)")
        if low < 0 or high > 255:
            raise InputError(f"values of {array.dtype} from {low} to {high}; expected 0 to 255: scale them, {_SCALED}")
    return array


def _rgb_array(image: Array) -> Array:
    """Repeat one channel, or lay four on white: 255 in an integer array, 1 in a float one, as transformers does."""
    if image.shape[0] == 1:
        return np.repeat(image, 3, axis=0)
    if image.shape[0] == 3:
        return image
    whole = np.issubdtype(image.dtype, np.integer)
    if not whole and image.max() > 1:
        raise InputError(f"an RGBA image of {image.dtype} spans {image.min()} to {image.max()}; expected 0 to 1.")
    white = 255 if whole else 1.0
    alpha = image[3:] / white
    blend = alpha * image[:3] + (1 - alpha) * white
    return (np.round(blend) if whole else blend).astype(image.dtype)
