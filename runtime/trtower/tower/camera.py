"""Fit the frame of a robot's camera into a square as its policy does, to the bit: in its own shape, with black around.

Sources: `resize_with_pad_torch` of LeRobot and openpi, `resize_with_pad` of LeRobot for SmolVLA, and
`image_tools.resize_with_pad` of openpi-client, which openpi's own policies run before the model sees a frame.

Shapes: C channels, H x W pixels of the camera, S pixels a side.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from trtower.errors import InputError
from trtower.tower.pictures import Array

CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How a policy fits a frame into a square.

    Attributes:
        centred: Whether black is added on both sides, the odd row or column last; else only on the left and on top.
        on_bytes: Whether Pillow resizes bytes, with antialiasing; else torch resizes fractions, without.
        clamped: Whether fractions are cut to their range once they are resized.
        after_normalising: Whether fractions are normalised first, to -1 to 1, and then resized.
    """

    centred: bool = True
    on_bytes: bool = False
    clamped: bool = True
    after_normalising: bool = False


PADDINGS = {
    "lerobot": Padding(),
    "smolvla": Padding(centred=False, clamped=False),
    "openpi": Padding(on_bytes=True),
    "openpi_pytorch": Padding(after_normalising=True),
}
"""Values of `resize_with_pad` in a preprocessor_config.json.

They stand for LeRobot's π0, π0.5 and π0-FAST; LeRobot's SmolVLA; openpi's policies; and openpi's
`preprocess_observation_pytorch`, which resizes only frames that no policy has resized before."""


def prepare_frame(
    frame: Array,
    padding: Padding,
    side: int | None,
    *,
    scale: Callable[[Array], Array] | None,
    normalize: Callable[[Array], Array] | None,
) -> Array:
    """Turn a frame (C, H, W) of bytes, or of fractions from 0 to 1, into (C, S, S); into (C, H, W) if ``side`` is None.

    ``scale`` turns bytes into fractions, and ``normalize`` fractions into what the tower accepts. Without ``scale`` the
    result is bytes: fractions are rounded. Raises InputError for other values.
    """
    if not frame.size:
        raise InputError(f"a frame without pixels, of shape {frame.shape}; leave it out")
    is_bytes = frame.dtype == np.uint8
    if not is_bytes and (frame.dtype.kind != "f" or not 0 <= frame.min() <= frame.max() <= 1):
        raise InputError(
            f"values of {frame.dtype} from {frame.min()} to {frame.max()}; expected a frame of uint8, from 0 to 255, "
            "or float, from 0 to 1"
        )
    if len(frame) != CHANNELS:
        raise InputError(f"{len(frame)} channels; expected a frame of red, green and blue")
    if padding.on_bytes:
        if not is_bytes:
            raise InputError(f"values of {frame.dtype}; openpi resizes frames of uint8, from 0 to 255")
        frame = _fit(frame, padding, side, _resize_bytes)
        return frame if scale is None else _normalized(scale(frame), normalize)
    if scale is None and is_bytes and (side is None or frame.shape[1:] == (side, side)):
        return frame
    fractions = (scale or _fractions)(frame) if is_bytes else frame.astype(np.float32)
    if padding.after_normalising and normalize and scale:
        return _fit(normalize(fractions), padding, side, _resize_fractions(padding, -1.0), black=-1.0)
    fitted = _fit(fractions, padding, side, _resize_fractions(padding, 0.0))
    return np.rint(fitted * 255).clip(0, 255).astype(np.uint8) if scale is None else _normalized(fitted, normalize)


def _fractions(frame: Array) -> Array:
    return np.divide(frame, np.float32(255), dtype=np.float32)


def _normalized(fractions: Array, normalize: Callable[[Array], Array] | None) -> Array:
    return normalize(fractions) if normalize else fractions


def _fit(
    frame: Array, padding: Padding, side: int | None, resize: Callable[[Array, int, int], Array], black: float = 0
) -> Array:
    """Resize a frame until its longer side is S, and fill the square up."""
    height, width = frame.shape[1:]
    if side is None or (height, width) == (side, side):
        return frame
    ratio = max(width / side, height / side)
    inner_height, inner_width = int(height / ratio), int(width / ratio)
    if not (inner_height and inner_width):
        raise InputError(
            f"{width} x {height} pixels, which leave nothing of the shorter side at {side} pixels: crop it"
        )
    top, left = side - inner_height, side - inner_width
    if padding.centred:
        top, left = top // 2, left // 2
    square = np.full((len(frame), side, side), black, frame.dtype)
    square[:, top : top + inner_height, left : left + inner_width] = resize(frame, inner_height, inner_width)
    return square


def _resize_bytes(frame: Array, height: int, width: int) -> Array:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(frame, 0, -1)))
    return np.moveaxis(np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)), -1, 0)


def _resize_fractions(padding: Padding, low: float) -> Callable[[Array, int, int], Array]:
    def resize(frame: Array, height: int, width: int) -> Array:
        pixels = torch.from_numpy(np.ascontiguousarray(frame))[None]
        resized = functional.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)[0]
        fitted: Array = (resized.clamp(low, 1.0) if padding.clamped else resized).numpy()
        return fitted

    return resize
