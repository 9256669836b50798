"""The files that features are written to, each complete in itself: names, hashes, features, and what made them.

To add a format, write a class like `Parquet` and list it in `FORMATS`.
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from trtower.extras import import_extra

Array = npt.NDArray[Any]

ROW_GROUP = 8 << 20
"""Bytes of features in a row group of Parquet."""

ABOUT = "trtower"
"""The key, in a file's own metadata, of the JSON that says what made it."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A picture without features, and why; ``stamp`` is that of its file (see picture.py), "" if there was none."""

    name: str
    reason: str
    stamp: str = ""


@dataclass(frozen=True, kw_only=True)
class Names:
    """Which pictures a file has features of, in its order, and what was ``left_out``.

    ``sha256`` and ``size`` are those of the pictures as they were read, encoded, and ``stamps`` those of their files
    (see picture.py). ``about`` says what made the features: the bundle, the backend, the certificate, the dtype and the
    shape of one picture's features.
    """

    names: Sequence[str]
    sha256: Sequence[str]
    size: Sequence[int]
    stamps: Sequence[str]
    left_out: Sequence[LeftOut]
    about: dict[str, Any]

    def metadata(self, **others: Any) -> str:
        """Return ``about``, ``stamps``, ``left_out`` and others as JSON."""
        left_out = [asdict(each) for each in self.left_out]
        return json.dumps({**self.about, "stamps": [*self.stamps], "left_out": left_out, **others}, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Rows(Names):
    """What a file holds: `Names`, and their ``features`` (n, N, D), or (n, D) of an embedding."""

    features: Array


class Format(Protocol):
    """A kind of file."""

    suffix: str

    def check(self) -> None:
        """Raise MissingExtraError if what it needs is not installed."""

    def write(self, stream: IO[bytes], rows: Rows) -> None:
        """Write rows into an empty file."""

    def names(self, path: Path) -> Names:
        """Read everything but the features. Raises nearly anything for a damaged file."""

    def read(self, path: Path) -> Rows:
        """Read a file."""


class Parquet:
    """Parquet, with the features of a picture as a fixed-size list: (N, D) in one row of N * D numbers."""

    suffix = "parquet"

    def check(self) -> None:
        """Raise MissingExtraError if pyarrow is not installed."""
        self._library("pyarrow")

    def write(self, stream: IO[bytes], rows: Rows) -> None:
        """Write rows, uncompressed: features of a tower hardly shrink."""
        arrow = self._library("pyarrow")
        numbers = arrow.array(rows.features.reshape(-1))
        row = arrow.list_(arrow.field("element", numbers.type, nullable=False), math.prod(rows.features.shape[1:]))
        types = {"name": arrow.string(), "sha256": arrow.string(), "size": arrow.int64(), "features": row}
        fields = [arrow.field(name, each, nullable=False) for name, each in types.items()]
        features = arrow.FixedSizeListArray.from_arrays(numbers, type=row)
        columns = [
            arrow.array(column, fields[index].type) for index, column in enumerate((rows.names, rows.sha256, rows.size))
        ]
        table = arrow.table([*columns, features], arrow.schema(fields, {ABOUT: rows.metadata()}))
        self._library("pyarrow.parquet").write_table(
            table,
            stream,
            row_group_size=max(1, ROW_GROUP // max(1, rows.features[:1].nbytes)),  # the writer takes several times that
            compression="none",
            use_dictionary=False,
            write_statistics=["name"],
            write_page_checksum=True,
        )

    def names(self, path: Path) -> Names:
        """Read everything but the features."""
        return self._names(self._read(path, ["name", "sha256", "size"]))

    def read(self, path: Path) -> Rows:
        """Read a file."""
        table = self._read(path, None)
        names = self._names(table)
        column = table.column("features")
        numbers = np.concatenate([np.empty(0, names.about["dtype"]), *(part.flatten() for part in column.chunks)])
        return Rows(**vars(names), features=numbers.reshape(len(names.names), *names.about["shape"]))

    def _read(self, path: Path, columns: list[str] | None) -> Any:
        with path.open("rb") as stream:
            return self._library("pyarrow.parquet").read_table(
                stream, columns=columns, page_checksum_verification=True, partitioning=None
            )

    def _names(self, table: Any) -> Names:
        about = json.loads(table.schema.metadata[ABOUT.encode()])
        columns = {key: table.column(key).to_pylist() for key in ("name", "sha256", "size")}
        return _names_of(about, names=columns.pop("name"), **columns)

    def _library(self, module: str) -> Any:
        return import_extra(module, extra="embed", purpose="writing Parquet")


class Safetensors:
    """safetensors, with one tensor `features`, and everything else in the file's metadata."""

    suffix = "safetensors"

    def check(self) -> None:
        """Do nothing: safetensors is always installed."""

    def write(self, stream: IO[bytes], rows: Rows) -> None:
        """Write rows."""
        from safetensors.numpy import save

        lists = {key: [*getattr(rows, key)] for key in ("names", "sha256", "size")}
        features = np.ascontiguousarray(rows.features)
        # Under one key: safetensors writes several in any order, and equal rows should make equal files.
        metadata = rows.metadata(**lists, crc32=zlib.crc32(features.data))
        stream.write(save({"features": features}, {ABOUT: metadata}))

    def names(self, path: Path) -> Names:
        """Read everything but the features."""
        from safetensors import safe_open

        with safe_open(path, "numpy") as file:
            return self._names(file.metadata())[0]

    def read(self, path: Path) -> Rows:
        """Read a file. Raises ValueError if its features are not those that were written."""
        from safetensors import safe_open

        with safe_open(path, "numpy") as file:
            names, crc32 = self._names(file.metadata())
            features = file.get_tensor("features")
        if zlib.crc32(np.ascontiguousarray(features).data) != crc32:
            raise ValueError("its checksum differs")
        return Rows(**vars(names), features=features)

    def _names(self, metadata: dict[str, str]) -> tuple[Names, int]:
        about = json.loads(metadata[ABOUT])
        lists = {key: about.pop(key) for key in ("names", "sha256", "size")}
        crc32 = about.pop("crc32")
        return _names_of(about, **lists), crc32


def _names_of(about: dict[str, Any], **lists: Any) -> Names:
    left_out, stamps = [LeftOut(**each) for each in about.pop("left_out")], about.pop("stamps")
    return Names(**lists, stamps=stamps, left_out=left_out, about=about)


FORMATS: dict[str, Format] = {each.suffix: each for each in (Parquet(), Safetensors())}
