"""Find pictures: in folders, by patterns and lists, in WebDataset's tar files and in Parquet. Reads only their names.

To add a kind of file that holds pictures, write a function that yields them and list it in `HOLDERS`.
"""

import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from trtower.embedding.picture import Picture, PictureFile, PictureInParquet, PictureInTar
from trtower.errors import ConfigError, one_line
from trtower.extras import import_extra

_FORMATS = "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
ENDINGS = frozenset(f".{name}" for name in _FORMATS.split())
"""What the names of pictures end in, in folders and in tar files: of formats that Pillow reads by itself."""

COMPRESSED = (".gz", ".tgz", ".zip", ".zst", ".bz2", ".xz")

STDIN = "-"
"""What stands for a list of pictures on standard input."""

Place = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The ``pictures`` in their order, and a ``remark`` about files that were not taken for pictures, or ""."""

    pictures: Sequence[Picture]
    remark: str


def find_pictures(places: Iterable[Place], column: str | None = None) -> Found:
    """Find the pictures of folders, patterns, lists, tar files, Parquet files and picture files, each once.

    A picture in a folder is named by its path below the folder; one in a tar file by the tar's path and its own; one in
    Parquet by the file's path and its row; any other as it was passed. ``column`` is the column of Parquet files.
    Raises ConfigError for a place that holds no pictures, and for two pictures of one name.
    """
    pictures: dict[str, Picture] = {}
    others: Counter[str] = Counter()
    for place in places:
        is_empty = True
        for picture in _find(place, column, others):
            is_empty = False
            _refuse_undecodable(picture.name)
            other = pictures.setdefault(picture.name, picture)
            if other != picture:
                raise ConfigError(
                    f"two pictures are called {picture.name}, in {other.path} and {picture.path}: pass a folder that "
                    "holds both, or embed them into two folders."
                )
        if is_empty:
            raise ConfigError(f"{os.fsdecode(place)} holds no pictures. {_describe(others)}".rstrip())
    if not pictures:
        raise ConfigError("no pictures: pass a folder, a pattern, a list (.txt), or files.")
    return Found(pictures=[*pictures.values()], remark=_describe(others))


def _refuse_undecodable(name: str) -> None:
    """Raise ConfigError for a name that no file of features can hold."""
    try:
        name.encode()
    except UnicodeEncodeError as err:
        raise ConfigError(f"the name {name!a} is not UTF-8, and no file of features can hold it: rename it.") from err


def _find(place: Place, column: str | None, others: Counter[str]) -> Iterator[Picture]:
    """Find the pictures of one place; count files of other endings in ``others``."""
    if not isinstance(place, str | os.PathLike):
        raise ConfigError(f"pictures holds a {type(place).__name__}; expected paths of files and folders.")
    text = os.fsdecode(place)
    path = Path(text).expanduser()
    if text == STDIN:
        return _of_lines(sys.stdin, Path())
    if "://" in text:
        raise ConfigError(f"{text} is an address: mount or download it, and pass the folder.")
    if path.is_dir():
        return _in_folder(path, others)
    if path.is_file():
        return _in_file(text, path, column, others)
    if path.exists():
        raise ConfigError(f"{text} is neither a file nor a folder.")
    if not has_magic(text):
        raise ConfigError(f"{text} does not exist; expected a folder, a pattern, a list, or a file of pictures.")
    return _matching(path, column, others)


def _matching(pattern: Path, column: str | None, others: Counter[str]) -> Iterator[Picture]:
    """Yield the pictures of the files that a pattern matches, sorted. As in a shell, * and ** match no hidden names."""
    parts = pattern.parts
    fixed = next(index for index, part in enumerate(parts) if has_magic(part))
    wild = "/".join(parts[fixed:])
    matches = sorted(Path(*parts[:fixed]).glob(wild))  # ** does not follow links, so it ends
    if not matches:
        raise ConfigError(f"nothing matches {pattern}.")
    for path in filter(Path.is_file, matches):
        if any(part[0] == "." for part in path.parts[fixed:]) and "/." not in f"/{wild}":
            continue
        if path.suffix.lower() in ENDINGS or path.suffix.lower() in HOLDERS:
            yield from _in_file(str(path), path, column, others)
        else:
            others[path.suffix.lower()] += 1


def _in_file(name: str, path: Path, column: str | None, others: Counter[str]) -> Iterator[Picture]:
    ending = path.suffix.lower()
    if ending in ENDINGS:
        yield PictureFile(name, str(path.absolute()))
    elif ending in HOLDERS:
        yield from HOLDERS[ending](name, path.absolute(), column, others)
    else:
        advice = "decompress it" if ending in COMPRESSED else "rename it, or name it in a list"
        raise ConfigError(
            f"{name} is by its ending neither a picture nor {', '.join(HOLDERS)}, which hold pictures: {advice}."
        )


def _in_folder(folder: Path, others: Counter[str]) -> Iterator[Picture]:
    """Yield the pictures below a folder, sorted, without hidden ones. Links are followed, but not to where they are."""
    above: dict[str, tuple[str, ...]] = {
        str(folder): (os.path.realpath(folder),)
    }  # every folder, with the real places of all that hold it

    def refuse(err: OSError) -> None:
        raise ConfigError(f"{err.filename} cannot be read ({err.strerror}): make it readable, or pass its neighbours.")

    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        holders = above.pop(root)
        real = {name: os.path.realpath(Path(root, name)) for name in folders if name[0] != "."}
        folders[:] = sorted(name for name, place in real.items() if place not in holders)
        above |= {str(Path(root, name)): (*holders, real[name]) for name in folders}
        for path in (Path(root, name) for name in sorted(files) if name[0] != "."):
            if path.suffix.lower() in ENDINGS:
                yield PictureFile(path.relative_to(folder).as_posix(), str(path.absolute()))
            else:
                others[path.suffix.lower()] += 1


def _in_list(name: str, path: Path, _: str | None, __: Counter[str]) -> Iterator[Picture]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as err:
        raise ConfigError(f"{name} is not a list: it is not UTF-8 text ({one_line(err)}).") from err
    return _of_lines(lines, path.parent)


def _of_lines(lines: Iterable[str], folder: Path) -> Iterator[Picture]:
    """Yield the pictures of a list: paths, from ``folder`` on. They are not looked for yet."""
    return (PictureFile(line, str((folder / line).absolute())) for line in map(str.strip, lines) if line)


def _in_tar(name: str, path: Path, _: str | None, others: Counter[str]) -> Iterator[Picture]:
    parts: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                ending = Path(member.name).suffix.lower()
                if member.isreg() and not member.issparse():
                    parts[member.name] = (member.offset_data, member.size)
                elif member.islnk() and member.linkname in parts:  # the same bytes once more
                    parts[member.name] = parts[member.linkname]
                elif ending in ENDINGS:
                    others[f"{ending} that are links or sparse in a tar file"] += 1
                if ending in ENDINGS and member.name in parts:
                    yield PictureInTar(f"{name}/{member.name.removeprefix('./')}", str(path), *parts[member.name])
            _refuse_rest(name, path, archive.offset)
    except tarfile.TarError as err:
        raise ConfigError(f"{name} is not a whole tar file: {one_line(err)}. If it is compressed, unpack it.") from err


def _refuse_rest(name: str, path: Path, end: int) -> None:
    """Raise ConfigError unless a tar file ends where its members do: tarfile takes a damaged header for the end."""
    with path.open("rb") as stream:
        stream.seek(end)
        blocks = iter(lambda: stream.read(1 << 20), b"")
        first = next(blocks, b"")
        if len(first) < tarfile.BLOCKSIZE or any(block.strip(b"\0") for block in (first, *blocks)):
            raise ConfigError(
                f"{name} is not a whole tar file: after {end} bytes it is cut or damaged, or another tar file follows. "
                "Make it again."
            )


def _in_parquet(name: str, path: Path, column: str | None, _: Counter[str]) -> Iterator[Picture]:
    parquet = import_extra("pyarrow.parquet", extra="embed", purpose="reading Parquet")
    arrow = import_extra("pyarrow", extra="embed", purpose="reading Parquet")
    try:
        with parquet.ParquetFile(path) as file:
            chosen, kind = _choose_column(name, file.schema_arrow, column)
            if kind == "paths":
                lines = file.read(columns=[chosen]).column(0).to_pylist()
                yield from _of_lines(filter(None, lines), path.parent)
            else:
                rows = range(file.metadata.num_rows)
                yield from (PictureInParquet(f"{name}#{row}", str(path), chosen, row) for row in rows)
    except (arrow.ArrowInvalid, OSError) as err:
        raise ConfigError(f"{name} is not a whole Parquet file: {one_line(err)}.") from err


HOLDERS: dict[str, Callable[[str, Path, str | None, Counter[str]], Iterator[Picture]]] = {
    ".txt": _in_list,
    ".tar": _in_tar,
    ".parquet": _in_parquet,
}
"""What finds the pictures in a file of this ending: by its name as passed, its path and the column. What it passes over
is counted in the last argument."""


def _choose_column(name: str, schema: Any, column: str | None) -> tuple[str, str]:
    """Return the column of a Parquet file that holds pictures, and whether as "bytes" or as "paths"."""
    kinds = {field.name: _kind(field.type) for field in schema}
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if column is None:
        of_bytes = [each for each, kind in kinds.items() if kind == "bytes"]
        if len(of_bytes) == 1:
            return of_bytes[0], "bytes"
        found = "several columns" if of_bytes else "no column"
        raise ConfigError(
            f"{name} has {found} of bytes; name the one of the pictures with --column. It has: {columns}."
        )
    if not kinds.get(column):
        what = "that holds neither bytes nor paths, as column" if column in kinds else "no column"
        raise ConfigError(f"{name} has {what} {column!r}. It has: {columns}.")
    return column, kinds[column]


def _kind(of: Any) -> str:
    """Return what an Arrow type can hold: "bytes", also in a struct as in Hugging Face's datasets; "paths"; or ""."""
    types = import_extra("pyarrow.types", extra="embed", purpose="reading Parquet")
    if types.is_struct(of):
        return "bytes" if any(field.name == "bytes" and _kind(field.type) == "bytes" for field in of) else ""
    if types.is_dictionary(of):
        return _kind(of.value_type)
    if types.is_binary(of) or types.is_large_binary(of) or types.is_binary_view(of):
        return "bytes"
    return "paths" if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of) else ""


def _describe(others: Counter[str]) -> str:
    """Say which files were passed over, by their endings."""
    if not others:
        return ""
    counts = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in others.most_common())
    packed = next((ending for ending in HOLDERS if others[ending]), "")
    advice = f" To take the {packed} files, pass them by themselves." if packed else ""
    return f"Passed over files that are not pictures by their ending: {counts}.{advice}"
