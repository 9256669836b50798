"""Open encoded pictures from bytes, within limits: what a file, a message or a row of a table holds."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

from trtower.errors import InputError, one_line
from trtower.spec import MIB
from trtower.tower.pictures import TO_REPLACE

if TYPE_CHECKING:
    from PIL.Image import Image

MEGA = 10**6

LARGEST_FILE = 512 * MIB
LARGEST_PICTURE = 89_478_485
"""Pixels from which on Pillow warns of a decompression bomb: a quarter of a GiB in RGB."""


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's names of the formats that it reads by itself. For others, such as EPS, it starts a program."""

_limits = threading.Lock()
_lifted: list[int | None] = []


class TooLargeError(InputError):
    """A picture exceeds a limit."""


def open_encoded(content: bytes, *, max_bytes: int = LARGEST_FILE, max_pixels: int = LARGEST_PICTURE) -> "Image":
    """Open an encoded picture; raise InputError if it is none, or TooLargeError. Pixels are not decoded yet."""
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise InputError("its file is empty")
    if len(content) > max_bytes:
        raise TooLargeError(f"its file has more than {max_bytes / MIB:.3g} MiB")
    Image.init()  # knows every format then
    try:
        image = Image.open(BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as err:
        raise InputError("Pillow finds no picture in it") from err
    except Exception as err:  # Pillow's plugins raise nearly anything for a damaged file
        raise InputError(f"Pillow cannot open it ({one_line(err)})") from err
    if image.width * image.height > max_pixels:
        size = f"{image.width * image.height / MEGA:.3g} megapixels, more than {max_pixels / MEGA:.3g}"
        raise TooLargeError(f"it has {size}")
    return image


def describe(err: Exception) -> str:
    """Say in one line what is wrong with an encoded picture, given what opening, decoding or preparing it raised."""
    text = one_line(getattr(err, "strerror", None) or err)
    return text.removeprefix("images: ").removesuffix(TO_REPLACE)


@contextmanager
def no_limit_of_pillow() -> Iterator[None]:
    """Lift Pillow's own limit of pixels, which is the process's, inside the block: `open_encoded` has one."""
    from PIL import Image

    with _limits:
        _lifted.append(Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _limits:  # several may be inside: the last one out restores what the first one found
            first = _lifted[0]
            _lifted.pop()
            if not _lifted:
                Image.MAX_IMAGE_PIXELS = first
