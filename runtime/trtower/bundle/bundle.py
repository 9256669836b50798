"""Read, verify and write a bundle: the folder that holds everything deployment needs. Does not import torch.

Reading its files is in files.py. A writer never shows half a bundle: see staging.py.
"""

import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from trtower.bundle.certificate import Certificate
from trtower.bundle.files import BundleFiles
from trtower.bundle.manifest import (
    BUILD_NOTES,
    CONFIG,
    FUSED_GRAPH,
    GRAPH,
    GRAPH_DATA,
    MANIFEST,
    PREPROCESSOR,
    Manifest,
    PlanEntry,
)
from trtower.bundle.not_a_bundle import describe_instead, read_folder
from trtower.bundle.staging import describe, disk_errors, staged, write_manifest
from trtower.bundle.tuning import Tuning
from trtower.errors import BundleError


class Bundle(BundleFiles):
    """A bundle on disk. `open` reads its manifest and checks that its files are present in full size.

    Attributes:
        path: The folder.
        manifest: The content of tower.json when the bundle was opened.
    """

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, whole: bool = True) -> "Bundle":
        """Open a bundle: read its manifest, and check that every listed file is there. Hashes nothing yet.

        Args:
            path: The folder that `trtower export` wrote.
            whole: Refuse missing and cut-short files, except build logs. False is for callers that report them.

        Returns:
            The bundle.

        Raises:
            BundleError: This is not a bundle, the manifest is invalid, or a file is missing, cut short or misplaced.
            ConfigError: ``path`` is not a path.
        """
        folder = read_folder(path, "bundle")
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as err:
            raise BundleError(f"{folder} is not a bundle: {describe_instead(folder)}") from err
        except UnicodeDecodeError as err:
            raise BundleError(f"{folder / MANIFEST} is not UTF-8 text ({err}). Copy the bundle again.") from err
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

    def find_certificate(self, backend: str, file: str | None, kind: str | None = None) -> Certificate | None:
        """Find the certificate that decides about a backend and a file that it executes.

        There may be several: by check or by verify, and for several GPUs. One that failed decides, then the newest.

        Args:
            backend: The backend's name, such as "tensorrt-rtx".
            file: The graph, or a plan.
            kind: "check" or "verify", to look only for that kind.

        Returns:
            The certificate, which may have failed or be void; None if this was not checked.
        """
        certificates = [each for each in self.manifest.certificates if kind in (None, each.kind)]
        found = [each for each in certificates if each.backend == backend and file in each.executed]
        valid = [each for each in found if not self.changed_since(each)]
        failed = [each for each in valid if not each.passed]
        return next(reversed(failed or valid or found), None)

    def changed_since(self, certificate: Certificate, altered: Collection[str] = ()) -> list[str]:
        """List the files that changed since a check, which make its certificate void.

        Args:
            certificate: The certificate of the check.
            altered: Files known not to match the manifest; they count as changed.

        Returns:
            The names of the certificate's files that are altered, gone from the manifest, or have another sha256 there.
        """
        files = self.manifest.files
        return [
            name
            for name, sha256 in certificate.files.items()
            if name in altered or name not in files or files[name].sha256 != sha256
        ]

    def uncertifiable(self) -> str | None:
        """Say why no certificate can vouch for this bundle on any backend.

        Returns:
            The reason as a clause, such as "it has no certificate"; None if a certificate may vouch for it.
        """
        if not self.manifest.certificates:
            return "it has no certificate"
        if self.manifest.source.random_weights:
            return "it is a rehearsal, with random weights"
        return None

    def why_uncertified(
        self, backend: str, executed: Sequence[str], altered: Collection[str] | None = None
    ) -> str | None:
        """Say why no certificate vouches for the files that a backend executes.

        Args:
            backend: The backend's name.
            executed: The files that it executes.
            altered: The bundle's altered files, if they are known. None reads and compares the certificate's files,
                except ``executed``, which were compared when they were loaded.

        Returns:
            The reason as a clause; None if a certificate vouches for the files.
        """
        if reason := self.uncertifiable():
            return reason
        certificate = self.find_certificate(backend, executed[0])
        if certificate is None:
            checked = " and ".join(f"{each.executed[0]} on {each.backend}" for each in self.manifest.certificates)
            return f"{executed[0]} on {backend} was not checked, only {checked}"
        if not certificate.passed:
            return f"its {certificate.proof} of {certificate.date} missed {', '.join(certificate.missed)}"
        if altered is None:
            altered = self.altered(certificate.files.keys() - set(executed))
        if void := self.changed_since(certificate, altered):
            return f"its certificate is void because {', '.join(void)} changed after the check"
        return None

    def add_plan(self, plan: PlanEntry, staged: Path, log: Path | None = None) -> "Bundle":
        """Move a plan and the log of its build into the bundle. The plan replaces one for the same target.

        Call this while holding the lock of `locked`. A file name in the old manifest is never reused for other bytes,
        so a concurrent reader finds either the old plan with the old manifest, or the new plan with the new one.

        Args:
            plan: The manifest's entry for the plan. If other content has its file name already, part of the plan's
                sha256 is added to the name.
            staged: The plan's file, on the same file system as the bundle, because it is renamed and not copied.
            log: The log of the build, if any, on the same disk.

        Returns:
            The bundle with the plan.

        Raises:
            BundleError: The bundle now has another graph, or its plans folder is a link to another place.
        """
        current = self._reread((GRAPH, GRAPH_DATA), "plan")
        if not (self.path / plan.file).parent.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{(self.path / plan.file).parent} leads out of the bundle; no plan was added.")
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
        replaced = [old for old in current.plans if plan.replaces(old)]
        superseded = {name for old in replaced for name in (old.file, old.log)}
        files = {name: file for name, file in current.files.items() if name not in superseded}
        plans = (*(old for old in current.plans if old not in replaced), plan)
        gone = superseded - added.keys()
        certificates = tuple(each for each in current.certificates if gone.isdisjoint(each.executed))
        files |= added
        bundle = self._rewrite(replace(current, plans=plans, files=files, certificates=certificates))
        for name in gone:
            (self.path / name).unlink(missing_ok=True)
        return bundle

    def add_certificate(self, certificate: Certificate) -> "Bundle":
        """Add a certificate, replacing the one of its kind for the same files, backend and GPU.

        Call this under the lock of `locked`.

        Args:
            certificate: The result of a check or a verification.

        Returns:
            The bundle with the certificate.

        Raises:
            BundleError: The bundle no longer has the files that were checked.
        """
        current = self._reread(certificate.files, "certificate")
        others = [each for each in current.certificates if each.subject != certificate.subject]
        return self._rewrite(replace(current, certificates=(*others, certificate)))

    def add_tuning(self, tuning: Tuning) -> "Bundle":
        """Add what `trtower tune` measured, replacing what it had for this device; call it under the lock of `locked`.

        Raises BundleError if the bundle no longer has the graph that was timed.
        """
        current = self._reread((GRAPH, FUSED_GRAPH, GRAPH_DATA), "tuning")
        others = [each for each in current.tunings if each.subject != tuning.subject]
        return self._rewrite(replace(current, tunings=(*others, tuning)))

    def _reread(self, names: Iterable[str], added: str) -> Manifest:
        """Read the manifest again; raise BundleError if any of ``names`` has changed in it."""
        current = Bundle.open(self.path).manifest
        if any(current.files.get(name) != self.manifest.files.get(name) for name in names):
            raise BundleError(
                f"{self.path} was exported or built again, so this {added} is out of date: open the bundle and make "
                f"the {added} again."
            )
        return current

    def copy_to(self, folder: Path) -> "Bundle":
        """Copy the bundle into a folder, verifying every file.

        Args:
            folder: A folder that does not exist, is empty, or holds only a bundle, which is replaced. If that bundle
                holds the same tower, unaltered, nothing is copied: it keeps its own plans and certificates.

        Returns:
            The bundle in ``folder``.

        Raises:
            BundleError: ``folder`` holds other files, is the working directory, or is being written by another process;
                or a file of this bundle is altered.
            BuildError: The disk is full.
        """
        folder = folder.expanduser().resolve()
        if (folder / MANIFEST).is_file():
            there = Bundle.open(folder)
            of_plans = {name for plan in self.manifest.plans for name in (plan.file, plan.log)}
            names = self.manifest.files.keys() - of_plans
            is_same = all(there.manifest.files.get(name) == self.manifest.files[name] for name in names)
            if is_same and there.manifest.spec == self.manifest.spec and not there.altered(names):
                return there
            known = {folder / name for name in (*there.manifest.files, MANIFEST, BUILD_NOTES)}
            foreign = [path.name for path in sorted(folder.rglob("*")) if path.is_file() and path not in known]
            if foreign:
                raise BundleError(
                    f"{folder} holds a bundle and {foreign[0]}, so it was not replaced. Choose another folder."
                )
        if folder == Path.cwd():
            raise BundleError(f"{folder} is the current folder, which a bundle cannot replace: choose one inside it.")
        with disk_errors(folder), staged(folder, overwrite=True) as staging:
            for name in self.manifest.files:
                if name in self._logs and not (self.path / name).exists():
                    continue
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.verify(name), staging / name)
            if (self.path / BUILD_NOTES).is_file():
                shutil.copyfile(self.path / BUILD_NOTES, staging / BUILD_NOTES)
            write_manifest(staging, self.manifest)
        return Bundle.open(folder)

    def _rewrite(self, manifest: Manifest) -> "Bundle":
        write_manifest(self.path, manifest)
        return Bundle(self.path, manifest)
