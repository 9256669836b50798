"""Read, verify and write a bundle: the folder that holds everything deployment needs. No torch.

A reader trusts nothing: names are checked before they are joined to a path, and a file's sha256 before a
backend sees a byte of it. A writer never shows half a bundle: see staging.py.
"""

import hashlib
import mmap
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from trtower.bundle.certificate import Certificate
from trtower.bundle.manifest import CONFIG, GRAPH, GRAPH_DATA, MANIFEST, PREPROCESSOR, Manifest, PlanEntry
from trtower.bundle.staging import describe, disk_errors, staged, write_manifest
from trtower.errors import BundleError, ConfigError


class Bundle:
    """A bundle on disk whose manifest has been read and whose files are there in their full size."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, whole: bool = True) -> "Bundle":
        """Read the manifest; raise BundleError where it or a file it lists is missing, cut short or misplaced.

        Without ``whole`` a file may be missing or cut short: for whoever tells of it. The log of a build always may.
        Raises ConfigError if ``path`` is not a path.
        """
        folder = read_folder(path, "bundle")
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as err:
            raise BundleError(f"{folder} is not a bundle: {_say_what_instead(folder)}") from err
        except UnicodeDecodeError as err:
            raise BundleError(f"{folder / MANIFEST} is not UTF-8 text: {err}") from err
        try:
            manifest = Manifest.from_json(text)
        except BundleError as err:
            raise BundleError(f"{folder}: {err}") from err
        bundle = cls(folder, manifest)
        for name in [*manifest.files, *(plan.file for plan in manifest.plans), GRAPH, GRAPH_DATA, CONFIG, PREPROCESSOR]:
            bundle._locate(name)
            if whole and name not in bundle._logs:
                bundle._check_present(name)
        return bundle

    def verify(self, name: str) -> Path:
        """Compare a file with its sha256 in the manifest and return its path."""
        path = self._check_present(name)
        self._compare(name, describe(path).sha256)
        return path

    def altered(self, names: Collection[str] | None = None) -> list[str]:
        """List the files, or those of ``names``, whose content is not what the manifest says. Reads them all.

        The log of a build may be missing.
        """
        wanted = self.manifest.files.keys() if names is None else names
        return [name for name in self.manifest.files if name in wanted and self._is_altered(name)]

    def _is_altered(self, name: str) -> bool:
        try:
            return describe(self.path / name) != self.manifest.files[name]
        except FileNotFoundError:  # since the bundle was opened, unless it may be missing
            return name not in self._logs
        except (IsADirectoryError, NotADirectoryError):
            return True

    def find_certificate(self, backend: str, file: str | None) -> Certificate | None:
        """Find the certificate of what a backend executes, ``file`` among it; None where it was not checked."""
        found = (each for each in self.manifest.certificates if each.backend == backend and file in each.executed)
        return next(found, None)

    def changed_since(self, certificate: Certificate, altered: Collection[str] = ()) -> list[str]:
        """List the files that a certificate speaks of and that are others now; all that are ``altered`` are."""
        files = self.manifest.files
        return [
            name
            for name, sha256 in certificate.files.items()
            if name in altered or name not in files or files[name].sha256 != sha256
        ]

    def uncertifiable(self) -> str | None:
        """Say why no certificate can vouch for this bundle, whatever runs it; None where one may."""
        if not self.manifest.certificates:
            return "it has no certificate"
        if self.manifest.source.random_weights:
            return "it is a rehearsal, with random weights"
        return None

    def why_uncertified(
        self, backend: str, executed: Sequence[str], altered: Collection[str] | None = None
    ) -> str | None:
        """Say why no certificate vouches for the files that a backend executes; None where one does.

        ``altered`` are the bundle's altered files. Without them what the certificate speaks of is read, but for
        ``executed``: whoever has executed a file has compared what he read of it.
        """
        if reason := self.uncertifiable():
            return reason
        certificate = self.find_certificate(backend, executed[0])
        if certificate is None:
            checked = " and ".join(f"{each.executed[0]} on {each.backend}" for each in self.manifest.certificates)
            return f"{executed[0]} on {backend} was not checked, {checked} was"
        if not certificate.passed:
            return f"its check of {certificate.date} missed {', '.join(certificate.missed)}"
        if altered is None:
            altered = self.altered(certificate.files.keys() - set(executed))
        if void := self.changed_since(certificate, altered):
            return f"its certificate is void, {', '.join(void)} changed since"
        return None

    def read(self, name: str) -> bytes:
        """Read a file whole, and compare what was read with its sha256 in the manifest."""
        content = self._check_present(name).read_bytes()
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def map(self, name: str) -> mmap.mmap:
        """Map a file read-only and compare what is mapped with its sha256 in the manifest.

        The map stays on this very file, whatever takes its name later, and costs no copy.
        """
        with self._check_present(name).open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    @contextmanager
    def steady(self, *names: str) -> Iterator[None]:
        """Verify files that a library opens by their paths inside the block; raise where one was replaced meanwhile."""
        before = [_identity(self._check_present(name)) for name in names]
        for name in names:
            self.verify(name)
        yield
        for name, identity in zip(names, before, strict=True):
            if _identity(self._check_present(name)) != identity:
                raise BundleError(f"{self.path / name} was replaced while it was loaded: load the bundle again.")

    def add_plan(self, plan: PlanEntry, staged: Path, log: Path | None = None) -> "Bundle":
        """Move a staged plan, and the log of its build, into the bundle; it supersedes one for the same target.

        Call it under `locked`. Raises BundleError where the bundle has another graph by now.

        A name that the old manifest vouches for is never given to other bytes: whoever reads the bundle meanwhile
        finds the old plan under the old manifest, or the new one under the new.
        """
        current = self._reread((GRAPH, GRAPH_DATA), "plan")
        if not (self.path / plan.file).parent.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{(self.path / plan.file).parent} leads out of the bundle: refused.")
        entry = describe(staged)
        if current.files.get(plan.file, entry) != entry:
            plan = replace(plan, file=f"{plan.file.removesuffix('.plan')}.{entry.sha256[:8]}.plan")
        (self.path / plan.file).parent.mkdir(exist_ok=True)
        added = {plan.file: entry, **({plan.log: describe(log)} if log else {})}
        for name, source in ((plan.file, staged), (plan.log, log)):
            if source:
                with source.open("rb") as stream:
                    os.fsync(stream.fileno())
                source.replace(self.path / name)
        gone = [old for old in current.plans if plan.replaces(old)]
        superseded = {name for old in gone for name in (old.file, old.log)}
        files = {name: file for name, file in current.files.items() if name not in superseded}
        plans = (*(old for old in current.plans if old not in gone), plan)
        bundle = self._rewrite(replace(current, plans=plans, files={**files, **added}))
        for name in superseded - added.keys():
            (self.path / name).unlink(missing_ok=True)
        return bundle

    def add_certificate(self, certificate: Certificate) -> "Bundle":
        """Write the certificate into the manifest, in the place of one for the same.

        Call it under `locked`. Raises BundleError if the bundle has other files by now than were checked.
        """
        current = self._reread(certificate.files, "certificate")
        checked = (certificate.backend, certificate.executed)
        others = [each for each in current.certificates if (each.backend, each.executed) != checked]
        return self._rewrite(replace(current, certificates=(*others, certificate)))

    def _reread(self, names: Iterable[str], added: str) -> Manifest:
        """Read the manifest that is there now; raise BundleError if it has other files of these ``names``."""
        current = Bundle.open(self.path).manifest
        if any(current.files.get(name) != self.manifest.files.get(name) for name in names):
            raise BundleError(f"{self.path} was exported again meanwhile, and the {added} is of what it was before.")
        return current

    def copy_to(self, folder: Path) -> "Bundle":
        """Copy the bundle, every file verified, into a folder that is absent, empty, or holds another bundle alone.

        A folder that holds the same tower, unaltered, is left as it is, with the plans and certificates that were added
        to it. Raises BundleError if the folder holds anything else, or a file of this bundle is altered.
        """
        folder = folder.expanduser().resolve()
        if (folder / MANIFEST).is_file():
            there = Bundle.open(folder)
            names = (GRAPH, GRAPH_DATA, CONFIG, PREPROCESSOR)
            is_same = all(there.manifest.files.get(name) == self.manifest.files[name] for name in names)
            if is_same and there.manifest.spec == self.manifest.spec and not there.altered(names):
                return there
            known = {folder / name for name in (*there.manifest.files, MANIFEST)}
            foreign = [path.name for path in sorted(folder.rglob("*")) if path.is_file() and path not in known]
            if foreign:
                raise BundleError(
                    f"{folder} holds {foreign[0]} beside a bundle: it is left alone. Name another folder."
                )
        if folder == Path.cwd():
            raise BundleError(
                f"{folder} is the current folder, and a bundle is put in place whole: name one inside it."
            )
        with disk_errors(folder), staged(folder, overwrite=True) as staging:
            for name in self.manifest.files:
                if name in self._logs and not (self.path / name).exists():
                    continue
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.verify(name), staging / name)
            write_manifest(staging, self.manifest)
        return Bundle.open(folder)

    def _rewrite(self, manifest: Manifest) -> "Bundle":
        write_manifest(self.path, manifest)
        return Bundle(self.path, manifest)

    @property
    def _logs(self) -> set[str]:
        """The logs of builds, the only files that may be missing."""
        return {plan.log for plan in self.manifest.plans}

    def _locate(self, name: str) -> Path:
        """Return the path of a listed file, which is inside the bundle."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name} is not listed in {MANIFEST}, so nothing vouches for it.")
        path, pure = self.path / name, PurePosixPath(name)
        is_odd = "\0" in name or pure.is_absolute() or ".." in pure.parts
        if is_odd or not path.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{self.path}: {MANIFEST} lists {name!r}, which leads out of the bundle: refused.")
        return path

    def _check_present(self, name: str) -> Path:
        """Return the path of a listed file that lies inside the bundle in its full size."""
        path, entry = self._locate(name), self.manifest.files[name]
        if not path.is_file():
            raise BundleError(f"{path} is missing; {MANIFEST} lists it with {entry.size} bytes. Copy the bundle again.")
        if path.stat().st_size != entry.size:
            raise BundleError(
                f"{path} has {path.stat().st_size} bytes; {MANIFEST} says {entry.size}. Copy the bundle again."
            )
        return path

    def _compare(self, name: str, found: str) -> None:
        expected = self.manifest.files[name].sha256
        if found != expected:
            raise BundleError(
                f"{self.path / name} was altered: its sha256 is {found[:12]}…, {MANIFEST} says {expected[:12]}…. "
                "Copy the bundle again."
            )


def read_folder(path: object, name: str) -> Path:
    """Return the path of a folder as the user named it, ``name`` being the option; raise ConfigError if it is none."""
    try:
        folder = Path(path).expanduser()  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as err:  # another type, or the home of nobody
        said = f"{path!r}" if isinstance(path, str) else f"of type {type(path).__name__}"
        raise ConfigError(f"{name} is {said}; the path of a folder is expected.") from err
    if "\0" in str(folder):
        raise ConfigError(f"{name} is {str(folder)!r}; the path of a folder is expected, which has no NUL in it.")
    return folder


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _say_what_instead(folder: Path) -> str:
    """Say what there is in the place of a bundle, and where one may be or what makes one."""
    if folder.is_file():
        is_part = (folder.parent / MANIFEST).is_file()
        return f"it is a file {f'of {folder.parent}, which is one.' if is_part else 'and no folder.'}"
    if folder.exists():
        inside = [each.parent.name for each in sorted(folder.glob(f"[!.]*/{MANIFEST}"))]
        found = f"; {', '.join(inside)} in it {'are' if inside[1:] else 'is'}" if inside else ""
        of = (folder, " of it") if (folder / CONFIG).is_file() else ("CHECKPOINT", "")
        return f"it has no {MANIFEST}{found}. `trtower export {of[0]}` makes one{of[1]}."
    beside = [each.parent for each in sorted(folder.parent.glob(f"{folder.name}.*/{MANIFEST}"))]
    made = "`trtower export CHECKPOINT` makes one."
    # Such as openai/clip-vit-base-patch32, on the hub, and no bundle that lies elsewhere.
    if len(folder.parts) == 2 and not folder.parent.exists() and folder.parts[0] != "engines":
        made = f"`trtower export {folder}` makes one of that on the hub."
    where = "" if folder.is_absolute() else f" in {Path.cwd()}"
    return f"it does not exist{where}. {f'There is {beside[0]}.' if beside else made}"
