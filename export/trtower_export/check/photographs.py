"""Load photographs to compare towers on, from a folder or from scikit-image's wheel.

Real photographs are needed: noise does not excite the outlier channels on which half precision fails.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from trtower.errors import InputError
from trtower.extras import import_extra
from trtower.parity.bounds import PHOTOGRAPH
from trtower.spec import NHWC, TowerSpec
from trtower.tower.image_processor import ImageProcessor
from trtower.tower.pictures import to_rgb
from trtower_export.console import Progress

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

# All of these are in scikit-image's wheel; it downloads the rest of its data set on demand.
SHIPPED = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "camera.png",
    "coins.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "moon.png",
    "grass.png",
    "brick.png",
)

SEED = 0
SQUARES = 8
"""Squares along each side of the drawn image of pure colours."""

# What Pillow's decoders raise on a damaged file; DecompressionBombError is not an OSError.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_DAMAGED = "as unreadable"


@dataclass(frozen=True)
class Photograph:
    """One RGB image and its file name; ``kind`` differs for images that were drawn."""

    name: str
    image: Image.Image
    kind: str = PHOTOGRAPH


@dataclass(frozen=True)
class Photographs:
    """The images in order, and the reason for each file that was skipped."""

    images: tuple[Photograph, ...]
    reasons: Mapping[str, str]

    @property
    def skipped(self) -> tuple[str, ...]:
        """The files that were skipped."""
        return tuple(self.reasons)

    @property
    def sha256(self) -> str:
        """A digest of names, sizes and decoded RGB pixels.

        It identifies the tower's input, whatever the file format.
        """
        digest = hashlib.sha256()
        for photograph in self.images:
            width, height = photograph.image.size
            digest.update(f"{photograph.name}\0{width}x{height}\0".encode(errors="surrogateescape"))
            digest.update(photograph.image.tobytes())
        return digest.hexdigest()

    def first(self, count: int) -> "Photographs":
        """Return only the first ``count`` images."""
        return replace(self, images=self.images[:count])


def load_photographs(folder: Path | None, *, limit: int | None = None) -> Photographs:
    """Read the photographs of ``folder`` in order of name, or a dozen from scikit-image's wheel.

    They are read as the processor reads them: EXIF orientation is ignored, and transparency becomes white. With
    ``limit``, stop after that many readable files. ``skipped`` lists the files that are damaged or that the processor
    rejects. Raises InputError if ``folder`` is not a folder or has no readable image, and MissingExtraError if
    scikit-image is needed and not installed.
    """
    paths = _shipped() if folder is None else _image_files(folder)
    skipped: dict[str, str] = {}
    images = tuple(islice(_read(paths, skipped), limit))
    if not images:
        why = "; ".join(reason for reason in dict.fromkeys(skipped.values()) if reason != _DAMAGED)
        raise InputError(
            f"{paths[0].parent} has no readable image: found {_named([*skipped])}, "
            f"{why or 'damaged or not an image'}; "
            "expected at least one photograph: replace the files or name another folder"
        )
    return Photographs(images, skipped)


def prepare(photographs: Sequence[Photograph], processor: ImageProcessor) -> list[Tensor]:
    """Preprocess photographs into pixel_values, one image each, as the processor makes them: floats or bytes.

    Raises InputError, which names the photograph that fails.
    """
    prepared = []
    for photograph in photographs:
        try:
            prepared.append(processor.preprocess(photograph.image, return_tensors="pt")["pixel_values"])
        except InputError as err:
            raise InputError(f"{photograph.name}: {err}") from err
    return prepared


def prepare_floats(photographs: Sequence[Photograph], processor: ImageProcessor, spec: TowerSpec) -> list[Tensor]:
    """Preprocess photographs for PyTorch's tower with a bundle's processor: (1, 3, S, S) each, in FP32."""
    processor = processor if spec.takes_floats else processor.preparing_floats()
    return [pixel_values.float() for pixel_values in prepare(photographs, processor)]


def channels_first(pixels: Tensor, spec: TowerSpec) -> Tensor:
    """View one image, as a bundle's engine takes it, as (3, S, S)."""
    return pixels.permute(2, 0, 1) if spec.layout == NHWC else pixels


def say_skipped(photographs: Photographs, progress: Progress) -> None:
    """Report which files were skipped, how many, and why."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in photographs.reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        progress.say(f"skipped {len(names)} {reason}: {_named(names)}")


def draw_images(size: int) -> tuple[Photograph, ...]:
    """Draw images that no camera takes, ``size`` pixels a side: noise, plain grey, all white, squares of pure colours.

    They cover cases that photographs do not: all tokens alike, and every pixel at its limit.
    """
    generator = np.random.default_rng(SEED)
    noise = generator.integers(0, 256, (size, size, 3))
    grey, white = np.full((size, size, 3), 128), np.full((size, size, 3), 255)
    squares = (generator.integers(0, 2, (SQUARES, SQUARES, 3)) * 255).repeat(-(-size // SQUARES), 0)
    squares = squares.repeat(-(-size // SQUARES), 1)[:size, :size]
    drawn = {"noise": ("noise", noise), "grey": ("constant", grey)}
    drawn |= {"white": ("saturated", white), "squares": ("saturated", squares)}
    return tuple(
        Photograph(name, Image.fromarray(pixels.astype(np.uint8)), kind) for name, (kind, pixels) in drawn.items()
    )


def _shipped() -> list[Path]:
    skimage = import_extra("skimage", extra="demo", purpose="the dozen sample photographs")
    data = Path(skimage.__file__).parent / "data"
    return [data / name for name in SHIPPED]


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {problem}; expected a folder of photographs: check the path")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not paths:
        raise InputError(
            f"{folder} has no image files; expected {', '.join(sorted(SUFFIXES))} directly in it: "
            "add photographs or name another folder"
        )
    return sorted(paths, key=lambda path: path.name)


def _read(paths: Iterable[Path], skipped: dict[str, str]) -> Iterable[Photograph]:
    for path in paths:
        try:
            with Image.open(path) as image:
                picture = to_rgb(image)
        except InputError as err:
            skipped[path.name] = f"because {err}"
        except _UNREADABLE:
            skipped[path.name] = _DAMAGED
        else:
            yield Photograph(path.name, picture)


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
