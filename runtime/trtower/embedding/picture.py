"""A picture by its name, and how to read its bytes: from a file of its own, a tar file, or a row of Parquet.

A picture says where its bytes are and holds none, so that any process can read it later.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any, Protocol

from trtower.errors import InputError
from trtower.extras import import_extra

ROWS_AT_ONCE = 16
"""Rows of a Parquet file that are read at a time."""

Read = Callable[[], bytes]
"""Reads the bytes of one picture."""


class Picture(Protocol):
    """A picture: its ``name`` among the features, and the ``path`` of the file that it is in."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def path(self) -> str: ...  # noqa: D102

    @classmethod
    def readers(cls, pictures: "list[Any]", most: int) -> Iterator[Read]:
        """Yield what reads each of ``pictures``, which are in one file. Any thread may call it, at any time.

        It returns at most one byte more than ``most``, and raises OSError or InputError.
        """


def open_each(pictures: Iterable[Picture], most: int) -> Iterator[tuple[Picture, Read]]:
    """Yield every picture with what reads its bytes, at most one more than ``most``."""
    for (kind, _), group in groupby(pictures, key=lambda picture: (type(picture), picture.path)):
        each = [*group]
        yield from zip(each, kind.readers(each, most), strict=True)


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture in a file of its own."""

    name: str
    path: str

    @classmethod
    def readers(cls, pictures: "list[PictureFile]", most: int) -> Iterator[Read]:
        """Yield what reads each file; see `Picture`."""
        return (partial(_read, picture.path, 0, most + 1) for picture in pictures)


@dataclass(frozen=True, slots=True)
class PictureInTar:
    """A picture of ``size`` bytes from ``offset`` on in a tar file."""

    name: str
    path: str
    offset: int
    size: int

    @classmethod
    def readers(cls, pictures: "list[PictureInTar]", most: int) -> Iterator[Read]:
        """Yield what reads each part of the file; see `Picture`."""
        return (partial(_read, each.path, each.offset, min(each.size, most + 1)) for each in pictures)


@dataclass(frozen=True, slots=True)
class PictureInParquet:
    """A picture in a ``row`` of a Parquet file, whose ``column`` holds its bytes."""

    name: str
    path: str
    column: str
    row: int

    @classmethod
    def readers(cls, pictures: "list[PictureInParquet]", most: int) -> Iterator[Read]:
        """Yield what returns each row's bytes. They are read here, in ascending rows, a few at a time."""
        parquet = import_extra("pyarrow.parquet", extra="embed", purpose="reading Parquet")
        with parquet.ParquetFile(pictures[0].path) as file:
            for content in _rows(file, pictures[0].column, {picture.row for picture in pictures}):
                yield partial(_bytes_of, content)


def _read(path: str, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not wait for a pipe's other end
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError("it is not a file")
        stream.seek(offset)
        return stream.read(size)


def _bytes_of(content: Any) -> bytes:
    if isinstance(content, dict):  # as Hugging Face's datasets store a picture
        content = content["bytes"]
    if not isinstance(content, bytes):
        raise InputError("its row is empty")
    return content


def _rows(file: Any, column: str, wanted: Set[int]) -> Iterator[Any]:
    """Yield the content of the ``wanted`` rows, in ascending order. Row groups without any are not read."""
    end = 0
    for group in range(file.num_row_groups):
        start, end = end, end + file.metadata.row_group(group).num_rows
        if wanted.isdisjoint(range(start, end)):
            continue
        batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column])
        for row, content in enumerate(chain.from_iterable(batch.column(0) for batch in batches), start):
            if row in wanted:
                yield content.as_py()
