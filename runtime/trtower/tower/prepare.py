"""Turn many pictures into batches of pixel values: decoded and prepared by several threads, in order.

Only as many pictures as the next batch needs, and one for each thread, are in memory at a time.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from io import IOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch

from trtower.errors import ConfigError, InputError, one_line
from trtower.tower.image_processor import ImageProcessor
from trtower.tower.pictures import CHANNELS

if TYPE_CHECKING:
    from PIL.Image import Image

    from trtower.tower.pictures import Array

Picture: TypeAlias = "str | os.PathLike[str] | Image | Array | torch.Tensor"
"""A file, an open picture, or bytes (H, W, C) or (C, H, W)."""

T = TypeVar("T")
R = TypeVar("R")

MOST_THREADS = 8
LONGEST_PATH = 200
"""Characters of a path in a message: somebody may pass a file's content for its name."""


def count_threads(threads: int | None) -> int:
    """Return how many threads prepare pictures: as asked, or one for each processor that this process may use."""
    if threads is None:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(usable or 1, MOST_THREADS)
    if type(threads) is not int or threads < 1:
        raise ConfigError(f"threads={threads!r}; expected a number of at least 1.")
    return threads


def in_order(work: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int) -> Generator[R, None, None]:
    """Yield ``work(item)`` in the order of ``items``, computed by several threads, up to ``ahead`` results ahead.

    Items are drawn in the caller's thread. What ``work`` raises is raised here, in its turn.
    """
    pool = ThreadPoolExecutor(threads, "trtower-prepare")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead + threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prepare_batches(
    pictures: "Iterable[tuple[str, Picture]]", processor: ImageProcessor, size: int, threads: int
) -> Iterator[torch.Tensor]:
    """Yield the pixel values of named pictures, ``size`` at a time; the last batch may be smaller.

    Raises InputError, which names the picture, for one that cannot be read or prepared.
    """
    owned = ((name, _own(name, picture)) for name, picture in pictures)
    batch: list[torch.Tensor] = []
    with closing(in_order(lambda each: _prepare(processor, *each), owned, threads=threads, ahead=size)) as prepared:
        for pixel_values in prepared:
            batch.append(pixel_values)
            if len(batch) == size:
                yield joined(batch)
                batch.clear()
        if batch:
            yield joined(batch)


def _own(name: str, picture: Picture) -> Picture:
    """Return what a thread may keep: an iterator may draw its next picture into the same object, or close its file.

    It also loads a picture, which two threads must not do at once. Files are read by the threads.
    """
    if isinstance(picture, str | os.PathLike):
        return picture
    if isinstance(picture, np.ndarray):
        return picture.copy()
    if isinstance(picture, torch.Tensor):
        return picture.clone()
    try:
        return picture.copy()
    except MemoryError:
        raise
    except Exception as err:  # Pillow's decoders raise nearly anything for a damaged file
        raise InputError(
            f"{name}: Pillow cannot decode it ({one_line(err)}); replace the file, or keep it open until this call"
        ) from err


def joined(batch: list[torch.Tensor]) -> torch.Tensor:
    """Join prepared pictures into one batch; raise InputError if they have several shapes."""
    shapes = {tuple(each.shape[1:]): None for each in batch}
    if len(shapes) > 1:
        raise InputError(
            f"pictures come out as {' and '.join(map(str, shapes))}: set image_processor.do_center_crop=True or a "
            "fixed size, as in the bundle."
        )
    return torch.cat(batch)


def each_picture(pictures: Any, processor: ImageProcessor, name: str = "pictures") -> "Iterator[tuple[str, Picture]]":
    """Yield every picture with its name: what was passed, and for a file its path. Raises InputError."""
    from PIL.Image import Image

    if isinstance(pictures, str | os.PathLike):
        path = os.fsdecode(pictures)
        yield f"{name}, {path if len(path) <= LONGEST_PATH else path[:LONGEST_PATH] + '…'}", path
    elif isinstance(pictures, Image):
        yield name, pictures
    elif isinstance(pictures, np.ndarray | torch.Tensor):
        yield from _each_of_array(pictures, name, fractions=processor.resize_with_pad is not None)
    elif isinstance(pictures, Iterable) and not isinstance(pictures, IOBase | bytes | bytearray | memoryview | dict):
        for index, picture in enumerate(pictures):
            yield from each_picture(picture, processor, f"{name}[{index}]")
    else:
        raise InputError(
            f"{name} is of type {type(pictures).__name__}; expected a path, a PIL image, a uint8 array or tensor, or "
            "several of these."
        )


def _each_of_array(pictures: "Array | torch.Tensor", name: str, *, fractions: bool) -> "Iterator[tuple[str, Picture]]":
    """Yield the picture or the pictures of an array of bytes; frames of a camera may also be ``fractions``."""
    dtype = str(pictures.dtype).removeprefix("torch.")
    if dtype != "uint8" and not (fractions and "float" in dtype):
        raise InputError(
            f"{name} has dtype {pictures.dtype}; expected uint8, from 0 to 255. For pixel values that are prepared "
            "already: tower(pixel_values)."
        )
    if pictures.ndim not in (3, 4):
        raise InputError(
            f"{name} has shape {tuple(pictures.shape)}; expected (H, W, C), (C, H, W) or a batch of them. Grey is "
            "(H, W, 1)."
        )
    if pictures.ndim == 3:
        if pictures.shape[0] in CHANNELS and pictures.shape[-1] in CHANNELS:
            raise InputError(
                f"{name} has shape {tuple(pictures.shape)}, whose channels could be first or last. Say which in "
                "tower.image_processor(picture, return_tensors='pt', input_data_format=…), and pass its pixel_values "
                "to the tower."
            )
        yield name, pictures
    else:
        yield from ((f"{name}[{index}]", picture) for index, picture in enumerate(pictures))


def _prepare(processor: ImageProcessor, name: str, picture: Picture) -> torch.Tensor:
    """Prepare one picture: (1, 3, S, S), or bytes in the engine's layout."""
    try:
        if not isinstance(picture, str):
            return prepare(processor, picture)
        with _open(Path(picture)) as image:
            return prepare(processor, image)
    except InputError as err:
        raise InputError(f"{name}: {str(err).removeprefix('images: ')}") from err


def prepare(processor: ImageProcessor, picture: Any) -> torch.Tensor:
    """Turn one picture into what the engine takes: (1, 3, S, S), or bytes in its layout."""
    pixel_values: torch.Tensor = processor.preprocess(picture, return_tensors="pt")["pixel_values"]
    return pixel_values


def _open(path: Path) -> "Image":
    """Open a picture's file; raise InputError, which says what else it is."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except UnidentifiedImageError:
        why = "Pillow finds no picture in it. Of a video, decode the frames and pass them as arrays"
    except IsADirectoryError:
        why = "it is a folder; pass its files, as in sorted(Path(folder).glob('*.jpg'))"
    except (OSError, ValueError, Image.DecompressionBombError) as err:
        why = f"it cannot be opened: {one_line(getattr(err, 'strerror', None) or err)}"
        if "*" in path.name:
            why += f"; of a pattern, pass the files: sorted(Path({str(path.parent)!r}).glob({path.name!r}))"
    raise InputError(why)
