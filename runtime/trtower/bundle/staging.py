"""Write a bundle without ever showing half of one.

A writer works in a staging folder beside the target, under a lock that the system drops when the process dies, and
renames at the end.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trtower.bundle.manifest import MANIFEST, FileEntry, Manifest
from trtower.errors import BuildError, BundleError


def describe(path: Path) -> FileEntry:
    """Take a file's size and sha256."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return FileEntry(sha256=digest.hexdigest(), size=path.stat().st_size)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step."""
    staged = folder / f".{MANIFEST}.staging"
    with staged.open("w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    staged.replace(folder / MANIFEST)


@contextmanager
def locked(target: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Be the only writer of the bundle at ``target``; raise BundleError where another process is, and remains."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(_beside(target, "lock")).acquire(timeout=wait_s)
    except Timeout as err:
        raise BundleError(f"another process is writing {target}: wait for it, or name another folder.") from err
    with held:
        yield


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its name when the block ends well.

    When the block raises the folder is removed; when the process dies, the next writer removes it. An old
    bundle is set aside only once the new one is whole, and put back if the second rename fails; should the
    process die between the two, the next writer does so.
    """
    target = target.resolve()
    with locked(target):
        folder, aside = _beside(target, "staging"), _beside(target, "old")
        if aside.exists() and not target.exists():
            aside.rename(target)
        for leftover in (folder, aside):
            shutil.rmtree(leftover, ignore_errors=True)
        refuse_existing(target, overwrite=overwrite)
        folder.mkdir()
        try:
            yield folder
            _sync(folder)
            if target.exists():
                target.rename(aside)
            folder.rename(target)
        finally:
            if aside.exists() and not target.exists():
                aside.rename(target)
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def disk_errors(target: Path | str) -> Iterator[None]:
    """Turn a disk that fills up, wherever that is noticed, into one clear BuildError."""
    try:
        yield
    except OSError as err:
        cut_short = err.errno is None and str(err).endswith("written")  # numpy's word for it
        if not cut_short and err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise BuildError(
            f"the disk filled up while {target} was written ({err.strerror or err}): nothing half-written was "
            "left behind. Free some space, or take another disk."
        ) from err


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise BundleError where ``target`` is taken: by a bundle without ``overwrite``, by anything else always."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise BundleError(f"{target} exists and is not a bundle: it is left alone. Name another folder with --out.")
    if not overwrite:
        raise BundleError(f"{target} exists: it is replaced only with --overwrite, or name another folder with --out.")


def _beside(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.{suffix}"


def _sync(folder: Path) -> None:
    """Have the disk hold every file of a folder, so that a rename cannot outlive what it names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
