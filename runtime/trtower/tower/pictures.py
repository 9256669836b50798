"""Read what a caller passes as pictures into (C, H, W) arrays of values from 0 to 255.

Ambiguous input is refused, never guessed: which value of a 16-bit picture is white, or which side of a (3, 200, 3)
array holds the channels. As in transformers' PIL processors, EXIF orientation is ignored.

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

TO_REPLACE = "; replace the file, or keep it open until this call"

_SCALED = "(np.asarray(picture) / white * 255).clip(0, 255).astype(np.uint8)"
_NOT_OPENED = (
    ((str, PathLike), "PIL.Image.open(path)"),
    ((bytes, bytearray, memoryview), "PIL.Image.open(io.BytesIO(data))"),
    ((IOBase,), "PIL.Image.open(file)"),
)


def flatten(
    images: Images, input_data_format: str | None = None, name: str = "images"
) -> "Iterator[tuple[str, Image | Array]]":
    """Yield every picture in ``images``, with its name: the position, such as "images[3]".

    ``images`` is one picture, a batch, or nested lists and iterators of these. Raises InputError for anything else.
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
                f"Pass input_data_format={GREY!r} only for greyscale (H, W)."
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
    """Return a (C, H, W) array, new or a view, of finite values from 0 to 255, with 3 channels if ``rgb``.

    ``input_data_format`` applies to arrays only. Raises InputError, to which the caller adds the picture's name.
    """
    array = oriented(picture, input_data_format) if isinstance(picture, np.ndarray) else _decoded(picture, rgb=rgb)
    array = _checked(array)
    return _rgb_array(array) if rgb else array


def to_rgb(image: "Image") -> "Image":
    """Decode a picture and convert it to RGB, with transparency composited on white.

    Raises InputError if a channel has more than 8 bits, and Pillow's own errors if its file is damaged.
    """
    from PIL import Image

    _refuse_deep(image)
    if image.mode == "La":
        image = image.convert("LA")  # the only conversion from La that Pillow has
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
            f"mode {image.mode} does not have 8 bits per channel, and nothing tells which value is white; scale it: "
            f"PIL.Image.fromarray({_SCALED})"
        )


def _to_numpy(tensor: torch.Tensor, name: str) -> Array:
    """Copy a tensor from any device to NumPy; bfloat16 and float8, which NumPy lacks, become float32."""
    try:
        if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            tensor = tensor.float()
        return np.asarray(tensor.numpy(force=True))
    except (RuntimeError, TypeError) as err:
        raise InputError(
            f"{name} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}, which NumPy cannot read; "
            "expected a dense tensor with data: pass tensor.to_dense(), or tensor.dequantize()."
        ) from err


def oriented(array: Array, input_data_format: str | None) -> Array:
    """Return an array as (C, H, W), a view; raise InputError if its channels could be first or last, or are neither."""
    if input_data_format == GREY:
        return array[None]
    sides = {CHANNELS_FIRST: array.shape[0], CHANNELS_LAST: array.shape[-1]}
    fitting = [name for name, side in sides.items() if side in CHANNELS and input_data_format in (None, name)]
    if len(fitting) == 2:
        raise InputError(
            f"shape {array.shape} could have its channels first or last; pass input_data_format={CHANNELS_FIRST!r} or "
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
    except Exception as err:  # Pillow's decoders raise nearly anything for a damaged file
        raise InputError(f"Pillow cannot decode it ({type(err).__name__}: {err}){TO_REPLACE}") from err
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _unconverted(image: "Image") -> "Image":
    _refuse_deep(image)
    if image.mode in ("1", "P", "PA"):
        raise InputError(f"mode {image.mode} holds bits or palette indices, not brightness; set do_convert_rgb=True")
    return image


def _checked(array: Array) -> Array:
    """Return a plain array in native byte order; raise InputError if its values cannot be pixels."""
    if not array.size:
        raise InputError(f"a picture without pixels, of shape {array.shape}; leave it out")
    if array.dtype.kind == "b":
        raise InputError("values of dtype bool, where True could mean 1 or 255; for white, pass array * np.uint8(255)")
    if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
        raise InputError(f"values of dtype {array.dtype}; expected integers or floats of at most 64 bits")
    if np.ma.is_masked(array):
        raise InputError("masked values; fill them: array.filled(0)")
    array = np.asarray(array, array.dtype.newbyteorder("="))
    if array.dtype != np.uint8:
        low, high = array.min(), array.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError("values that are NaN or infinite; replace them: np.nan_to_num(array)")
        if low < 0 or high > 255:
            raise InputError(f"values of {array.dtype} from {low} to {high}; expected 0 to 255. Scale them: {_SCALED}")
    return array


def _rgb_array(image: Array) -> Array:
    """Repeat one channel, or composite four on white, as transformers does: 255 in integer arrays, 1 in float ones."""
    if image.shape[0] == 1:
        return np.repeat(image, 3, axis=0)
    if image.shape[0] == 3:
        return image
    whole = np.issubdtype(image.dtype, np.integer)
    if not whole and image.max() > 1:
        raise InputError(
            f"RGBA values of {image.dtype} from {image.min()} to {image.max()}; expected 0 to 1. For 0 to 255, pass "
            "array.round().astype(np.uint8)."
        )
    white = 255 if whole else 1.0
    alpha = image[3:] / white
    blend = alpha * image[:3] + (1 - alpha) * white
    return (np.round(blend) if whole else blend).astype(image.dtype)
