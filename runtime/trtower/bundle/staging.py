"""Write a bundle without ever showing half of one.

A writer fills a staging folder beside the target and renames it at the end. It works under a lock, which the system
releases if the process dies.
"""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trtower.bundle.manifest import MANIFEST, FileEntry, Manifest
from trtower.errors import BuildError, BundleError

WAIT_S = 60.0
"""How long to wait, before writing a result, while another process writes into the bundle."""


def describe(path: Path) -> FileEntry:
    """Return a file's size and sha256."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return FileEntry(sha256=digest.hexdigest(), size=path.stat().st_size)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically."""
    staged = folder / f".{MANIFEST}.staging"
    with staged.open("w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    staged.replace(folder / MANIFEST)


def check_writable(bundle: Path, instead: str) -> None:
    """Raise BundleError, which ends with what to do ``instead``, if nothing can be written into a bundle's manifest."""
    for folder in (bundle, bundle.resolve().parent):  # the lock file is beside the bundle
        if not os.access(folder, os.W_OK):
            raise BundleError(f"{folder} is read-only, and the result for {bundle} is written there: {instead}")


@contextmanager
def locked(target: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Be the only writer of the bundle at ``target`` inside the `with` block.

    Raises BundleError if another process is still writing after ``wait_s`` seconds, or the parent folder cannot be made
    or written.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise BundleError(
            f"cannot make {target.parent}: {err.strerror}. Choose another folder (for an export, with --out)."
        ) from err
    lock = _beside(target, "lock")
    try:
        held = FileLock(lock).acquire(timeout=wait_s)
    except OSError as err:  # including Timeout
        # filelock raises one or the other, depending on its version, if it cannot create the lock file.
        if isinstance(err, Timeout) and lock.exists():
            raise BundleError(
                f"another process is writing {target}: wait for it to end (or export to another folder, with --out)."
            ) from err
        raise BundleError(
            f"{target.parent} cannot be written: choose another folder (for an export, with --out), or copy the "
            "bundle to one."
        ) from err
    with held:
        yield


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, which is renamed to ``target`` if the block succeeds.

    If the block raises, the folder is removed; if the process dies, the next writer removes it. An old bundle is moved
    aside only once the new one is complete, and moved back if the second rename fails; if the process dies between the
    two renames, the next writer moves it back.
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
    """Turn the many errors of a full disk into one clear BuildError."""
    try:
        yield
    except OSError as err:
        cut_short = err.errno is None and str(err).endswith("written")  # numpy raises this without an errno
        if not cut_short and err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise BuildError(
            f"the disk filled up while writing {target} ({err.strerror or err}); nothing half-written was left behind. "
            "Free some space, or use another disk."
        ) from err


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise BundleError unless a bundle can be written to ``target``. It may be new or an empty folder.

    A bundle needs ``overwrite``. Any other file or folder is refused, and so is a path that is not valid text.
    """
    try:
        str(target.absolute()).encode()
    except UnicodeEncodeError as err:  # onnx would fail, but only after the weights were read and traced
        raise BundleError(
            f"{target.absolute()} cannot be decoded as {sys.getfilesystemencoding()}, the encoding of this locale, so "
            "no graph can be written there. Run with PYTHONUTF8=1, or choose another folder with --out."
        ) from err
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise BundleError(
            f"{target} exists and is not a bundle, so it was not touched. Choose another folder (for an export, with "
            "--out)."
        )
    if not overwrite:
        raise BundleError(f"{target} exists. Replace it with --overwrite, or choose another folder with --out.")


def _beside(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.{suffix}"


def _sync(folder: Path) -> None:
    """Flush every file of a folder to the disk, so that a crash after the rename cannot lose them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
