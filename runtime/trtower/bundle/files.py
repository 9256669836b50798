"""The files that a bundle's manifest lists: read, mapped and compared with their sha256. Does not import torch.

A reader trusts nothing: it checks names before joining them to a path, and a file's sha256 before anything is used that
was made of it.
"""

import hashlib
import mmap
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from trtower.bundle.manifest import MANIFEST, Manifest
from trtower.bundle.staging import describe
from trtower.errors import BundleError


class BundleFiles:
    """The files in a bundle's folder.

    Attributes:
        path: The folder.
        manifest: The content of tower.json when the bundle was opened.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def verify(self, name: str) -> Path:
        """Compare a file with its sha256 in the manifest.

        Args:
            name: A file that the manifest lists, such as "tower.onnx".

        Returns:
            The path of the file.

        Raises:
            BundleError: The file is not listed, missing or altered.
        """
        path = self._check_present(name)
        self._compare(name, describe(path).sha256)
        return path

    def altered(self, names: Collection[str] | None = None) -> list[str]:
        """List the files whose content does not match the manifest. Reads all of them.

        Args:
            names: The files to compare. None compares every listed file.

        Returns:
            The names of altered and missing files, in the manifest's order. A missing build log does not count.
        """
        compared = self.manifest.files.keys() if names is None else names
        return [name for name in self.manifest.files if name in compared and self._is_altered(name)]

    def _is_altered(self, name: str) -> bool:
        try:
            return describe(self.path / name) != self.manifest.files[name]
        except FileNotFoundError:  # a build log, or a file removed since the bundle was opened
            return name not in self._logs
        except (IsADirectoryError, NotADirectoryError):
            return True

    def read(self, name: str) -> bytes:
        """Read a whole file, and compare what was read with its sha256 in the manifest.

        Args:
            name: A file that the manifest lists.

        Returns:
            The content.

        Raises:
            BundleError: The file is not listed, missing or altered.
        """
        content = self._check_present(name).read_bytes()
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    @contextmanager
    def mapped(self, name: str) -> Iterator[mmap.mmap]:
        """Map a file without a copy, and compare what is mapped with its sha256 while the `with` block runs.

        What the block makes of the content must not be used if the end of the block raises. So this is for weights and
        indices, and not for anything that is parsed.

        Args:
            name: A file that the manifest lists.

        Yields:
            The map. It stays on this file, even if another file takes its name later. Writing into it changes no file,
            but before the end of the block counts as an alteration.

        Raises:
            BundleError: The file is not listed, missing or altered, which explains whatever the block raised.
        """
        with self._check_present(name).open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        with ThreadPoolExecutor(1) as thread:
            hashing = thread.submit(hashlib.sha256, content)  # lets other threads run
            try:
                yield content
            finally:
                self._compare(name, hashing.result().hexdigest())

    def map(self, name: str) -> mmap.mmap:
        """Map a file without a copy, and compare what is mapped with its sha256 in the manifest.

        Args:
            name: A file that the manifest lists.

        Returns:
            The map, as `mapped` yields it.

        Raises:
            BundleError: The file is not listed, missing or altered.
        """
        with self.mapped(name) as content:
            return content

    @contextmanager
    def steady(self, *names: str, numbers: str) -> Iterator[None]:
        """Verify files that a library opens by path inside the `with` block.

        Args:
            *names: Files that the manifest lists. They are compared with their sha256 before the block runs.
            numbers: Another one, whose content is only numbers. It is compared while the block runs, as in `mapped`.

        Raises:
            BundleError: A file is not listed, missing or altered, or was replaced before the end of the block.
        """
        before = {name: _identity(self._check_present(name)) for name in (*names, numbers)}
        for name in names:
            self.verify(name)
        with ThreadPoolExecutor(1) as thread:
            verifying = thread.submit(self.verify, numbers)
            try:
                yield
            finally:
                verifying.result()
        for name, identity in before.items():
            if _identity(self._check_present(name)) != identity:
                raise BundleError(f"{self.path / name} was replaced while it was being loaded: load the bundle again.")

    @property
    def _logs(self) -> set[str]:
        """The build logs, the only files that may be missing."""
        return {plan.log for plan in self.manifest.plans}

    def _locate(self, name: str) -> Path:
        """Return the path of a listed file; raise BundleError if it is not listed or leads out of the bundle."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name} is not listed in {MANIFEST}, so it cannot be verified.")
        path, pure = self.path / name, PurePosixPath(name)
        is_odd = "\0" in name or pure.is_absolute() or ".." in pure.parts
        if is_odd or not path.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(
                f"{self.path}: {MANIFEST} lists {name!r}, which leads out of the bundle. If it is a link, as in "
                "a hub's cache, copy the bundle with `cp -rL`."
            )
        return path

    def _check_present(self, name: str) -> Path:
        """Return the path of a listed file; raise BundleError unless it is there in full size."""
        path, entry = self._locate(name), self.manifest.files[name]
        if not path.is_file():
            raise BundleError(f"{path} is missing; {MANIFEST} lists it with {entry.size} bytes. Copy the bundle again.")
        if path.stat().st_size != entry.size:
            raise BundleError(
                f"{path} has {path.stat().st_size} bytes; {MANIFEST} says {entry.size}. Copy the bundle again."
            )
        return path

    def _compare(self, name: str, sha256: str) -> None:
        expected = self.manifest.files[name].sha256
        if sha256 != expected:
            raise BundleError(
                f"{self.path / name} was altered: its sha256 is {sha256[:12]}…, {MANIFEST} says {expected[:12]}…. "
                "Copy the bundle again."
            )


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
