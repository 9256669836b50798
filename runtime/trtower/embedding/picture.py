"""A picture by its name, and how to read its bytes: from a file of its own, a tar file, or a row of Parquet.

A picture says where its bytes are and holds none, so that any process can read it later.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

from trtower.errors import ConfigError, InputError, one_line
from trtower.extras import import_extra

ROWS_AT_ONCE = 16
"""Rows of a Parquet file that are read at a time."""

BUFFER = 1 << 20
"""Bytes of a Parquet file that are read at a time, so that a row group need not be in memory."""

T = TypeVar("T")

Read = Callable[[], tuple[bytes, str]]
"""Reads the bytes of one picture, with the stamp of the file that they are in, taken as it was read."""


class Picture(Protocol):
    """A picture: its ``name`` among the features, and the ``path`` of the file that it is in."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def path(self) -> str: ...  # noqa: D102

    def stamp(self) -> str:
        """Return the stamp that reading it now would give, or "" if there is no such file. Reads nothing."""

    @classmethod
    def readers(cls, pictures: "Sequence[Any]", most: int) -> Iterator[Read]:
        """Yield what reads each of ``pictures``, which are in one file. Any thread may call it, at any time.

        It returns at most one byte more than ``most``, and raises OSError, ValueError or InputError.
        """


def open_each(items: Iterable[tuple[T, Picture]], most: int) -> Iterator[tuple[T, Picture, Read]]:
    """Yield every picture with what came with it, and what reads its bytes, at most one more than ``most``.

    Each file of several pictures is opened once for all that follow one another. Raises ConfigError if one is damaged.
    """
    for (kind, _), group in groupby(items, key=lambda item: (type(item[1]), item[1].path)):
        each = [*group]
        readers = kind.readers([picture for _, picture in each], most)
        for (companion, picture), read in zip(each, readers, strict=True):
            yield companion, picture, read


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture in a file of its own."""

    name: str
    path: str

    def stamp(self) -> str:
        """Return the file's stamp; see `Picture`."""
        return _stamp_at(self.path)

    @classmethod
    def readers(cls, pictures: "Sequence[PictureFile]", most: int) -> Iterator[Read]:
        """Yield what reads each file; see `Picture`."""
        return (partial(_read, picture.path, 0, most + 1) for picture in pictures)


@dataclass(frozen=True, slots=True)
class PictureInTar:
    """A picture of ``size`` bytes from ``offset`` on in a tar file."""

    name: str
    path: str
    offset: int
    size: int

    def stamp(self) -> str:
        """Return the tar file's stamp; see `Picture`."""
        return _stamp_at(self.path)

    @classmethod
    def readers(cls, pictures: "Sequence[PictureInTar]", most: int) -> Iterator[Read]:
        """Yield what reads each part of the file; see `Picture`."""
        return (partial(_read, each.path, each.offset, min(each.size, most + 1)) for each in pictures)


@dataclass(frozen=True, slots=True)
class PictureInParquet:
    """A picture in a ``row`` of a Parquet file, whose ``column`` holds its bytes."""

    name: str
    path: str
    column: str
    row: int

    def stamp(self) -> str:
        """Return the stamp of the file's column; see `Picture`."""
        stamp = _stamp_at(self.path)
        return stamp and f"{stamp} {self.column}"

    @classmethod
    def readers(cls, pictures: "Sequence[PictureInParquet]", most: int) -> Iterator[Read]:
        """Yield what returns each row's bytes. They are read here, in the order of the file, a few at a time."""
        parquet = import_extra("pyarrow.parquet", extra="embed", purpose="reading Parquet")
        with Path(pictures[0].path).open("rb") as stream, parquet.ParquetFile(stream, buffer_size=BUFFER) as file:
            stamp, last = _stamp(os.fstat(stream.fileno())), -1
            rows: Iterator[tuple[int, Any]] = iter(())
            for index, picture in enumerate(pictures):
                if picture.row <= last or index == 0:  # the same file once more, by another name
                    rows = _rows(file, picture, {each.row for each in pictures[index:]})
                last = picture.row
                content = next((content for row, content in rows if row == picture.row), None)
                yield partial(_bytes_of, content, f"{stamp} {picture.column}")


def _read(path: str, offset: int, size: int) -> tuple[bytes, str]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not wait for a pipe's other end
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError("it is not a file")
        stream.seek(offset)
        return stream.read(min(size, max(0, status.st_size - offset))), _stamp(status)


def _stamp(status: os.stat_result) -> str:
    """Say which file this is, and when it last changed: whatever is written or moved to its path has another stamp."""
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _stamp_at(path: str) -> str:
    try:
        return _stamp(Path(path).stat())
    except (OSError, ValueError):
        return ""


def _bytes_of(content: Any, stamp: str) -> tuple[bytes, str]:
    if isinstance(content, dict):  # as Hugging Face's datasets store a picture
        content = content["bytes"]
    if not isinstance(content, bytes):
        raise InputError("its row is empty")
    return content, stamp


def _rows(file: Any, picture: PictureInParquet, wanted: Set[int]) -> Iterator[tuple[int, Any]]:
    """Yield the number and content of the ``wanted`` rows, in ascending order. Other row groups are not read."""
    end = 0
    for group in range(file.num_row_groups):
        start, end = end, end + file.metadata.row_group(group).num_rows
        if wanted.isdisjoint(range(start, end)):
            continue
        try:
            batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[picture.column])
            for row, content in enumerate(chain.from_iterable(batch.column(0) for batch in batches), start):
                if row in wanted:
                    yield row, content.as_py()
        except (OSError, ValueError) as err:  # Arrow's errors are of these two kinds
            raise ConfigError(
                f"{picture.path} is damaged in its row group {group}, rows {start} to {end - 1} ({one_line(err)}): "
                "replace the file."
            ) from err
