"""Embed shards: read and prepare pictures ahead in several threads, run the engine, write files in one more thread.

A shard is the pictures of one file. Batches end with it, so that a file has the same features whoever makes it and in
whatever order; but reading goes on across shards, and the engine does not wait.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from trtower.dtypes import DTYPES
from trtower.embedding.folder import write_file
from trtower.embedding.formats import FORMATS, LeftOut, Rows
from trtower.embedding.picture import Picture, Read, open_each
from trtower.errors import ConfigError
from trtower.tower.encoded import TooLargeError, describe, no_limit_of_pillow, open_encoded
from trtower.tower.prepare import count_threads, in_order, joined, prepare
from trtower.tower.vision_tower import VisionTower

PORTION = 128
"""Pictures that are prepared before the engine has its turn, if both need the same processors."""

Tick = Callable[[int], None]
"""Called with the number of pictures that were dealt with since the last call."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What to do with shards. It can be pickled.

    ``about`` is written into every file. Files of more than ``max_bytes``, and pictures of more than ``max_pixels``,
    are left out.
    """

    folder: Path
    format: str
    dtype: str
    shape: tuple[int, ...]
    about: dict[str, Any]
    batch_size: int
    threads: int
    max_bytes: int
    max_pixels: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The ``pictures`` that go into file number ``index``."""

    index: int
    pictures: Sequence[Picture]


@dataclass(frozen=True, kw_only=True)
class Done:
    """How many pictures of a shard are in its file, which is on the disk, and how many were left out."""

    index: int
    pictures: int
    left_out: int


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A picture that was read for a shard: its pixel values (1, 3, S, S), or a ``reason`` why it is left out."""

    shard: Shard
    name: str
    stamp: str = ""
    sha256: str = ""
    size: int = 0
    pixel_values: torch.Tensor | None = None
    reason: str = ""


def embed_shards(tower: VisionTower, work: Work, shards: Iterable[Shard], tick: Tick) -> Iterator[Done]:
    """Write the file of each shard, and yield it once it is on the disk."""
    reader = Reader(tower, work)
    written: Future[Done] | None = None
    # Threads that need the engine's own processors only slow it down, so they take turns with it, in large portions.
    share = tower.device.type == "cpu" and work.threads >= count_threads(None)
    ahead = work.threads if share else 2 * work.batch_size
    portion = max(1, PORTION // work.batch_size if share else 1) * work.batch_size
    with (
        no_limit_of_pillow(),
        ThreadPoolExecutor(1, "trtower-write") as writer,
        closing(in_order(reader.read, reader.open(shards), threads=work.threads, ahead=ahead)) as prepared,
    ):
        for shard, members in groupby(prepared, key=attrgetter("shard")):
            collected = _Collected(tower, work, len(shard.pictures), portion)
            for each in members:
                collected.add(each)
                tick(1)
            if written:  # one file is written while the next is computed, and no more are in memory
                yield written.result()
            written = writer.submit(_write, work, shard, collected.rows())
        if written:
            yield written.result()


class Reader:
    """Reads and prepares pictures."""

    def __init__(self, tower: VisionTower, work: Work) -> None:
        self._processor, self._work = tower.image_processor, work
        self._dtype = tower.dtype if tower.spec.takes_floats else torch.uint8

    def open(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, Picture, Read]]:
        """Yield each picture with its shard, and what reads its bytes."""
        items = ((shard, picture) for shard in shards for picture in shard.pictures)
        return open_each(items, self._work.max_bytes)

    def read(self, item: tuple[Shard, Picture, Read]) -> _Prepared:
        """Read and prepare a picture, in any thread."""
        (shard, picture, read), work, stamp = item, self._work, item[1].stamp()
        try:
            content, stamp = read()
            with open_encoded(content, max_bytes=work.max_bytes, max_pixels=work.max_pixels) as image:
                pixel_values = prepare(self._processor, image).to(self._dtype)  # here, to save memory
        except ConfigError:  # no fault of the picture
            raise
        except (OSError, ValueError) as err:  # InputError is one, too
            advice = "; see --max-mib and --max-megapixels" if isinstance(err, TooLargeError) else ""
            return _Prepared(shard=shard, name=picture.name, stamp=stamp, reason=describe(err) + advice)
        return _Prepared(
            shard=shard,
            name=picture.name,
            stamp=stamp,
            sha256=hashlib.sha256(content).hexdigest(),
            size=len(content),
            pixel_values=pixel_values,
        )


class _Collected:
    """What becomes one file: features are computed batch by batch, a portion of batches at a time.

    A batch is fetched when the next one runs, so that a GPU need not wait for the copy.
    """

    def __init__(self, tower: VisionTower, work: Work, most: int, portion: int) -> None:
        self._tower, self._work, self._portion = tower, work, portion
        self._waiting: list[_Prepared] = []
        self._running: tuple[list[_Prepared], torch.Tensor] | None = None
        self._kept: list[_Prepared] = []
        self._features = torch.empty((most, *work.shape), dtype=DTYPES[work.dtype])
        self._left_out: list[LeftOut] = []

    def add(self, picture: _Prepared) -> None:
        """Add a picture; run what waits if it is a whole portion."""
        if picture.pixel_values is None:
            self._left_out.append(LeftOut(name=picture.name, reason=picture.reason, stamp=picture.stamp))
            return
        self._waiting.append(picture)
        if len(self._waiting) == self._portion:
            self._run()

    def rows(self) -> Rows:
        """Run what is left, and return everything."""
        self._run()
        self._fetch()
        return Rows(
            names=[each.name for each in self._kept],
            sha256=[each.sha256 for each in self._kept],
            size=[each.size for each in self._kept],
            stamps=[each.stamp for each in self._kept],
            features=self._features[: len(self._kept)].numpy(),
            left_out=self._left_out,
            about=self._work.about,
        )

    def _run(self) -> None:
        for start in range(0, len(self._waiting), self._work.batch_size):
            batch = self._waiting[start : start + self._work.batch_size]
            pixel_values = joined([each.pixel_values for each in batch if each.pixel_values is not None])
            running = (batch, self._tower.run_prepared(pixel_values))
            self._fetch()
            self._running = running
        self._waiting.clear()

    def _fetch(self) -> None:
        if self._running is None:
            return
        (batch, features), self._running = self._running, None
        values = features.to(self._features.dtype).cpu()
        is_finite = values.isfinite().flatten(1).all(1)
        start = len(self._kept)
        for each, is_kept, of_engine in zip(batch, is_finite.tolist(), features, strict=True):
            if is_kept:
                self._kept.append(replace(each, pixel_values=None))
                continue
            overflows = bool(of_engine.isfinite().all())
            what = f"exceed {self._work.dtype}; see --dtype" if overflows else "are not finite; see trtower doctor"
            self._left_out.append(LeftOut(name=each.name, reason=f"its features {what}", stamp=each.stamp))
        self._features[start : len(self._kept)] = values[is_finite]


def _write(work: Work, shard: Shard, rows: Rows) -> Done:
    write_file(work.folder, shard.index, FORMATS[work.format], rows)
    return Done(index=shard.index, pictures=len(rows.names), left_out=len(rows.left_out))
