"""Pictures to embed, in folders and tar files."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, side: int = 60) -> Image.Image:
    """Draw a picture that differs from those of other seeds."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side + seed % 5, 3), np.uint8)
    return Image.fromarray(noise)


def encoded(seed: int) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


def fill(folder: Path, seeds: range) -> list[str]:
    """Write pictures into a folder, some of them below it; return their names, in the order in which they are found."""
    for seed in seeds:
        path = folder / ("deep/er" if seed % 3 == 2 else "") / f"{seed:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(seed))
    return [
        *(f"{seed:03}.png" for seed in seeds if seed % 3 != 2),
        *(f"deep/er/{seed:03}.png" for seed in seeds if seed % 3 == 2),
    ]


def make_tar(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path
