"""Pictures as a caller hands them over, to (C, H, W) arrays.

Shapes: C channels, H x W pixels.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from trtower.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image

Array: TypeAlias = npt.NDArray[Any]
Images: TypeAlias = "Image | Array | torch.Tensor | Sequence[Images]"


def flat(images: Images) -> "Iterator[Image | Array]":
    """Yield the single images in an image, a batch of them, or nested lists of either."""
    from PIL.Image import Image

    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().numpy()
    if isinstance(images, Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        yield images
    elif isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4):
        for image in images:
            yield from flat(image)
    else:
        found = f"an array of shape {images.shape}" if isinstance(images, np.ndarray) else f"a {type(images).__name__}"
        raise InputError(f"images holds {found}; give PIL images, or arrays or tensors of 3 or 4 dimensions.")


def channels_first(image: "Image | Array", *, rgb: bool) -> Array:
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
