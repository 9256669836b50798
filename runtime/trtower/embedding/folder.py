"""The folder that features are written to: what made them, which pictures are in it, one complete file after another.

    _embedding.json             what made the features, and how many there are
    features-000000.parquet     of up to `pictures_per_file` pictures each
    _left_out.jsonl             the pictures without features, and why

A file is written beside its place, flushed to the disk and renamed: a process that dies leaves complete files only, and
the next one embeds what they lack. Files of two towers never come together in one folder. Programs that read a folder
of Parquet pass over names that begin with an underscore or a dot.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import IO

from filelock import FileLock, Timeout

from trtower.bundle.staging import disk_errors
from trtower.embedding.formats import FORMATS, Format, Names, Rows
from trtower.embedding.picture import Picture, open_each
from trtower.errors import BuildError, ConfigError, TrtowerError, one_line

DESCRIPTION, LEFT_OUT, LOCK = "_embedding.json", "_left_out.jsonl", ".lock"
STAGING, PREFIX = ".staging", "features-"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Made:
    """What makes the features of a folder. Features that are made otherwise are never mixed with them.

    ``tower_sha256`` is that of the bundle's manifest, ``layers`` and ``tokens`` what was read of it, ``shape`` that of
    one picture's features: (N, D), or (D,) of an embedding.
    """

    schema: int
    format: str
    dtype: str
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    tokens: str
    bundle: str
    tower_sha256: str
    checkpoint: str
    random_weights: bool
    precision: str


@dataclass(frozen=True, kw_only=True)
class Description(Made):
    """All of _embedding.json: what makes the features, on which backend, and how many there are by now."""

    backend: str = ""
    complete: bool = False
    pictures: int = 0
    left_out: int = 0

    @classmethod
    def read(cls, folder: Path) -> "Description":
        """Read _embedding.json. Raises ConfigError if it is not one that this trtower wrote."""
        path = folder / DESCRIPTION
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ConfigError(f"{path} has schema {data['schema']}; this trtower reads {SCHEMA}: use another one.")
            lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
            return cls(**{**data, **lists})
        except FileNotFoundError as err:
            raise ConfigError(f"{folder} holds no features: it has no {DESCRIPTION}.") from err
        except (ValueError, KeyError, TypeError) as err:
            if isinstance(err, ConfigError):
                raise
            raise ConfigError(f"{path} is damaged ({one_line(err)}): embed into another folder.") from err

    @property
    def made(self) -> dict[str, object]:
        """The fields of `Made`."""
        return {each.name: getattr(self, each.name) for each in fields(Made)}

    def refuse_mixing(self, made: Made, folder: Path) -> None:
        """Raise ConfigError unless features that are ``made`` so may join those of a folder."""
        names = [each.name for each in fields(Made) if each.name not in ("schema", "bundle", "checkpoint")]
        differing = [name for name in names if getattr(self, name) != getattr(made, name)]
        if "tower_sha256" in differing:
            raise ConfigError(
                f"{folder} holds features of another tower, {self.bundle} ({self.checkpoint}, {self.precision}), not "
                f"of {made.bundle} ({made.checkpoint}, {made.precision}): embed into another folder."
            )
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{folder} holds features with {name} {_text(getattr(self, name))}, not {_text(getattr(made, name))}: "
                "embed into another folder, or with the same options as before."
            )


@dataclass(frozen=True, kw_only=True)
class Known:
    """A picture that a folder has: its ``sha256``, or the ``reason`` why it was left out, and its file's ``stamp``."""

    stamp: str
    sha256: str = ""
    reason: str = ""


@dataclass(kw_only=True)
class FeatureFolder:
    """A folder of features that is being written. `writing` opens it."""

    path: Path
    description: Description
    known: dict[str, Known] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)

    @property
    def format(self) -> Format:
        """The format of its files."""
        return FORMATS[self.description.format]

    def read_known(self) -> None:
        """Read which pictures its files have. Raises ConfigError for a file that is damaged, or not of this folder."""
        self.known.clear()
        self.taken.clear()
        for path, names in each_file(self.path, self.format):
            differing = [
                key for key, value in self.description.made.items() if _plain(names.about[key]) != _plain(value)
            ]
            if differing:
                raise ConfigError(f"{path} is of another run, with another {differing[0]}: remove it.")
            self.taken.add(int(path.stem.removeprefix(PREFIX)))
            for each in names.left_out:
                if self.known.get(each.name, each).reason:
                    self.known[each.name] = Known(reason=each.reason, stamp=each.stamp)
            for name, sha256, stamp in zip(names.names, names.sha256, names.stamps, strict=True):
                if name in self.known and not self.known[name].reason:
                    raise ConfigError(f"{path} has features of {name}, and so has an earlier file: remove {path}.")
                self.known[name] = Known(sha256=sha256, stamp=stamp)

    def lacking(self, pictures: Sequence[Picture], *, retry: bool) -> list[Picture]:
        """Return the pictures that the folder lacks.

        With ``retry`` those that were left out are among them, and otherwise only if their files changed since. Raises
        ConfigError if the folder has features of a picture whose bytes are others now.
        """
        lacking, doubtful = list[Picture](), list[Picture]()
        for picture in pictures:
            known = self.known.get(picture.name)
            if known is None or (known.reason and retry):
                lacking.append(picture)
            elif picture.stamp() != known.stamp:
                (lacking if known.reason else doubtful).append(picture)
        for name, picture, read in open_each(((each.name, each) for each in doubtful), sys.maxsize - 1):
            try:
                sha256 = hashlib.sha256(read()[0]).hexdigest()
            except (OSError, ValueError):  # InputError is one, too
                continue  # it is gone, and its features stay
            if sha256 != self.known[name].sha256:
                raise ConfigError(
                    f"{self.path} has features of {name}, but {picture.path} holds another picture now: embed into "
                    "another folder."
                )
        return lacking

    def free_indices(self) -> Iterator[int]:
        """Yield the numbers that no file has yet, in ascending order."""
        return (index for index in count() if index not in self.taken)

    def begin(self, backend: str, *, any_backend: bool) -> None:
        """Record that a backend begins to embed.

        With ``any_backend`` it may be another than the one that made the first features. Raises ConfigError otherwise.
        """
        first = self.description.backend or backend
        if first != backend and not any_backend:
            raise ConfigError(
                f"{self.path} was begun on {first}, and the best backend here is {backend}. Both are right within "
                f"their certificates, but not equal: to go on, name one, as in --backend {backend}."
            )
        self._describe(replace(self.description, backend=first, complete=False))

    def finish(self) -> Description:
        """Record how many pictures the folder has, as far as is known, and which were left out."""
        left_out = {name: known.reason for name, known in self.known.items() if known.reason}
        lines = [json.dumps({"name": name, "reason": reason}) for name, reason in left_out.items()]
        _replace(self.path / LEFT_OUT, "".join(f"{line}\n" for line in lines).encode())
        pictures = len(self.known) - len(left_out)
        self._describe(replace(self.description, complete=True, pictures=pictures, left_out=len(left_out)))
        return self.description

    def _describe(self, description: Description) -> None:
        self.description = description
        text = json.dumps(asdict(description), indent=2, ensure_ascii=False) + "\n"
        _replace(self.path / DESCRIPTION, text.encode())


@contextmanager
def writing(path: Path, made: Made) -> Iterator[FeatureFolder]:
    """Be the only one who writes features that are ``made`` so into a folder, which may have some already.

    Raises ConfigError if the folder holds anything else, BuildError if the disk is full.
    """
    try:
        str(path.absolute()).encode()
        path.mkdir(parents=True, exist_ok=True)
        held = FileLock(path / LOCK).acquire(timeout=0)
    except Timeout as err:
        raise ConfigError(f"another process is writing into {path}: wait for it to end, or embed elsewhere.") from err
    except UnicodeEncodeError as err:
        raise ConfigError(f"the name of {path!a} is not UTF-8: choose another folder.") from err
    except OSError as err:
        raise ConfigError(f"cannot write into {path}: {err.strerror or one_line(err)}. Choose another folder.") from err
    with held, disk_errors(path):
        names = (each.name for each in path.iterdir())
        found = sorted(name for name in names if name not in (LOCK, "lost+found") and not name.endswith(STAGING))
        if found and DESCRIPTION not in found:
            raise ConfigError(f"{path} holds {found[0]} and no {DESCRIPTION}, so it was not touched: choose another.")
        description = Description.read(path) if found else Description(**vars(made))
        description.refuse_mixing(made, path)
        for leftover in path.glob(f".*{STAGING}"):
            leftover.unlink(missing_ok=True)
        folder = FeatureFolder(path=path, description=description)
        folder.read_known()
        yield folder


def write_file(folder: Path, index: int, format_: Format, rows: Rows) -> None:
    """Write one file of a folder, complete or not at all. Raises BuildError if it cannot be written."""
    path = folder / f"{PREFIX}{index:06}.{format_.suffix}"
    try:
        with disk_errors(path), _staged(path) as stream:
            format_.write(stream, rows)
    except OSError as err:
        raise BuildError(f"{path} cannot be written: {err.strerror or one_line(err)}.") from err


def list_files(folder: Path, suffix: str) -> list[Path]:
    """List the files of features in a folder, in their order. Copies under other names are none of them."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d{{6,}}\.{suffix}", path.name))


def each_file(folder: Path, format_: Format) -> Iterator[tuple[Path, Names]]:
    """Yield each file of a folder with its pictures. Raises ConfigError for a damaged file."""
    for path in list_files(folder, format_.suffix):
        with naming_damage(path):
            names = format_.names(path)
        yield path, names


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turn whatever a library says of a damaged file into ConfigError."""
    try:
        yield
    except (TrtowerError, MemoryError):
        raise
    except Exception as err:
        raise ConfigError(
            f"{path} is damaged ({one_line(err)}): remove it, and its pictures are embedded again."
        ) from err


def _plain(value: object) -> object:
    return [*value] if isinstance(value, tuple) else value


@contextmanager
def _staged(path: Path) -> Iterator[IO[bytes]]:
    """Yield a stream beside a file, which replaces the file at the end of the block."""
    staging = path.with_name(f".{path.name}.{token_hex(4)}{STAGING}")
    try:
        with staging.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    with _staged(path) as stream:
        stream.write(content)


def _text(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
