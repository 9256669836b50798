"""Describe a bundle: what it is, its plans, which backends can run it here and why the others cannot."""

import dataclasses
import json
import os
from collections.abc import Iterator

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import CHECK, VERIFY, Certificate, describe_figure
from trtower.bundle.manifest import (
    BUILD_NOTES,
    CONFIG,
    GOLDEN,
    GRAPH,
    GRAPH_DATA,
    PREPROCESSOR,
    TO_PAD,
    BundleFacts,
    PlanEntry,
)
from trtower.bundle.tuning import Tuning
from trtower.errors import BundleError
from trtower.flavour import FLAVOURS
from trtower.runners.choose import Candidate, auto_choice, candidates, tunings_here
from trtower.runners.device import default_device
from trtower.runners.runtimes import plan_verdicts
from trtower.spec import MB, BatchProfile


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendRow:
    """One way to run a bundle here; ``auto`` marks the one that `auto` would open."""

    backend: str
    file: str | None
    device: str
    runs: bool
    obstacle: str | None
    reservation: str | None
    auto: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectedPlan(PlanEntry):
    """A plan and its ``size`` in bytes. ``verdicts`` maps each requirement to why it is not met here, or to None."""

    size: int
    verdicts: dict[str, str | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectedCertificate(Certificate):
    """A certificate, and the files that have changed since and so make it ``void``."""

    void: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectedTuning(Tuning):
    """A tuning, and why it is ``ignored`` here; None if `auto` follows it."""

    ignored: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection(BundleFacts):
    """What `trtower inspect` reports, with the same keys as its JSON. ``size`` is that of all files, in bytes.

    ``golden`` says whether it holds golden answers, by which `trtower verify` proves it.

    ``altered`` holds the files that do not match the manifest, including those in ``missing``. If a file that `auto`
    would open is among them, no row of ``backends`` is marked `auto`, because `auto` raises. Nothing runs a bundle if a
    file is missing or cut short, or one that every tower reads was altered.
    """

    path: str
    batch: BatchProfile
    hidden_size: int
    num_tokens: int
    num_patches: int
    golden: bool
    plans: list[InspectedPlan]
    size: int
    backends: list[BackendRow]
    tunings: list[InspectedTuning]
    certificates: list[InspectedCertificate]
    altered: list[str]
    missing: list[str]

    def describe_damage(self) -> str:
        """Return "a is missing, b was altered", or "" for a sound bundle."""
        return _describe_damage(self.altered, self.missing)


def inspect_bundle(bundle: Bundle) -> Inspection:
    """Describe a bundle. This hashes its files, but executes and deserialises none of them."""
    manifest, altered = bundle.manifest, bundle.altered()
    missing = [name for name in altered if not (bundle.path / name).is_file()]
    ways = candidates(bundle)
    choice, unusable = auto_choice(ways), _why_unusable(bundle, altered)
    return Inspection(
        **{each.name: getattr(manifest, each.name) for each in dataclasses.fields(BundleFacts)},
        path=str(bundle.path),
        batch=manifest.batch,
        hidden_size=manifest.output.row[-1],
        num_tokens=manifest.output.vectors[0],
        num_patches=manifest.spec.num_patches,
        golden=GOLDEN in manifest.files,
        plans=[_inspect_plan(bundle, plan, altered, missing) for plan in manifest.plans],
        size=sum(entry.size for entry in manifest.files.values()),
        backends=[
            _backend_row(each, unusable or _spoilt(each.file, each.plan, altered, missing), auto=each is choice)
            for each in ways
        ],
        tunings=[InspectedTuning(**vars(each.tuning), ignored=each.ignored) for each in tunings_here(bundle)],
        certificates=[
            InspectedCertificate(**vars(each), void=bundle.changed_since(each, altered))
            for each in manifest.certificates
        ],
        altered=altered,
        missing=missing,
    )


def _why_unusable(bundle: Bundle, altered: list[str]) -> str | None:
    """Say why nothing can load a bundle, whatever the backend; None if something may."""
    try:
        Bundle.open(bundle.path)
    except BundleError as err:
        return str(err).removeprefix(f"{bundle.path}{os.sep}")
    spoilt = [name for name in (CONFIG, PREPROCESSOR) if name in altered]  # every tower reads these
    return f"{_describe_damage(spoilt, [])}: copy the bundle again" if spoilt else None


def _inspect_plan(bundle: Bundle, plan: PlanEntry, altered: list[str], missing: list[str]) -> InspectedPlan:
    verdicts = {
        **plan_verdicts(plan, default_device("cuda")),
        "certificate": bundle.why_uncertified(plan.flavour, [plan.file], altered),
        "sha256": _spoilt(plan.file, plan, altered, missing),
    }
    return InspectedPlan(**vars(plan), size=bundle.manifest.files[plan.file].size, verdicts=verdicts)


def _backend_row(candidate: Candidate, damage: str | None, *, auto: bool) -> BackendRow:
    obstacle = candidate.obstacle or damage
    return BackendRow(
        backend=candidate.backend,
        file=candidate.file,
        device=str(candidate.device),
        runs=not obstacle,
        obstacle=obstacle,
        reservation=candidate.reservation,
        auto=auto and not obstacle,
    )


def _spoilt(file: str | None, plan: PlanEntry | None, altered: list[str], missing: list[str]) -> str | None:
    """Name the damaged files among those that running a plan, or a graph, reads; None if there are none."""
    read = [file, GRAPH_DATA] if plan is None else [file]
    if plan and plan.settings.stripped:
        read += [GRAPH, GRAPH_DATA]
    spoilt = [name for name in read if name in altered]
    return f"{_describe_damage(spoilt, missing)}: copy the bundle again" if spoilt else None


def _describe_damage(spoilt: list[str], missing: list[str]) -> str:
    gone, altered = ([name for name in spoilt if (name in missing) is there] for there in (True, False))
    return ", ".join(
        f"{', '.join(names)} {what}" for names, what in ((gone, "is missing"), (altered, "was altered")) if names
    )


def as_text(found: Inspection, *, why: bool = False) -> str:
    """Return a description as text; ``why`` adds what each plan needs and whether it is met here."""
    source, batch = found.source, found.batch
    tuned = " and ".join(dict.fromkeys(str(profile.opt) for profile in found.profiles))
    weights = "RANDOM WEIGHTS: a rehearsal; its features are meaningless" if source.random_weights else "pretrained"
    shape = f"({', '.join(map(str, found.input.shape))}) {found.input.dtype}"
    shape += "" if found.spec.takes_floats else ", RGB"
    lines = [
        f"{found.name}: {found.spec.family} tower from {source.checkpoint}",
        f"  weights      {weights} (sha256 {source.weights_sha256['float32'][:12]}…)",
        f"  reads        {found.spec.reading}",
        f"  keeps        {found.cut.describe_cut(found.full, found.precision)}",
        f"  precision    {_describe_precision(found)}",
        f"  graph        needs TensorRT {found.first_tensorrt} or later, or TensorRT-RTX"
        f"{f'; exported for {found.target.name}' if found.target else ''}",
        f"  pixel_values {shape}, batch {batch.min} to {batch.max}, best at {tuned}",
        *([f"  pictures     by {source.image_aspect_ratio}: {TO_PAD}"] if source.image_aspect_ratio else []),
        f"  features     {_describe_features(found)}",
        f"  on disk      {found.size / MB:.0f} MB, made by trtower {found.trtower}",
        "  plans",
        *_describe_plans(found, why=why),
        *([f"  DAMAGED      {found.describe_damage()}: copy the bundle again"] if found.altered else []),
        "  here",
        *_describe_backends(found),
        *_describe_tunings(found),
        *_describe_certificates(found),
    ]
    return "\n".join(lines)


def _describe_features(found: Inspection) -> str:
    head = found.spec.head
    return head.describe() if head else f"{found.num_patches} patches of {found.hidden_size}"


def _describe_precision(found: Inspection) -> str:
    parts = [found.precision]
    if found.calibration:
        parts.append(f"{found.calibration.layers} linear layers, calibrated on {found.calibration.images} images")
    if found.keep_fp32:
        parts.append(f"in FP32 {', '.join(found.keep_fp32)}")
    return ", ".join(parts)


def _describe_plans(found: Inspection, *, why: bool) -> Iterator[str]:
    for plan in found.plans:
        gpus = ", ".join(plan.compute_capabilities) or f"8.0 and later, as far as {plan.flavour} supports them"
        built = plan.settings.describe()
        yield f"    {plan.file} ({plan.size / MB:.0f} MB) for compute capability {gpus}, built {built}"
        if why:
            yield from (f"      {what:<18} {obstacle or 'met'}" for what, obstacle in plan.verdicts.items())
    if not found.plans:
        how = f"see {found.path}/{BUILD_NOTES}" if found.target else f"trtower build {found.path}"
        yield f"    none; a CPU needs none. On the GPU that will serve: {how}"


def _describe_backends(found: Inspection) -> Iterator[str]:
    plans = [plan.file for plan in found.plans]
    for row in found.backends:
        verdict = row.obstacle or f"on {row.device}"
        if row.auto:
            verdict += ", and auto picks it"
        if row.runs and row.reservation:
            verdict += f"{', although' if row.auto else ', but auto picks another:'} {row.reservation}"
        if len(plans) > 1 and row.file in plans and not verdict.startswith(row.file):
            verdict = f"{row.file}: {verdict}"
        yield f"    {'runs' if row.runs else 'not '} {row.backend:<17} {verdict}"


def _describe_tunings(found: Inspection) -> Iterator[str]:
    """Say for each tuning what it measured, and whether `auto` follows it."""
    for each in found.tunings:
        verdict = f"ignored, because {each.ignored}" if each.ignored else "which auto follows where no plan runs"
        yield f"  tuning       of {each.date} on {each.device}, {verdict}"
        yield f"    {each.describe()}"
    graphs = [row for row in found.backends if row.runs and row.backend not in FLAVOURS]
    if len(graphs) > 1 and all(each.ignored for each in found.tunings):
        yield f"  tuning       none for this device; race its backends with: trtower tune {found.path}"


def _describe_certificates(found: Inspection) -> Iterator[str]:
    """Describe each certificate in one line, then the plans that no check has run."""
    for each in found.certificates:
        if each.void:
            next_step = "" if found.altered else f": trtower {each.kind} {found.path} --backend {each.backend}"
            proof = f"is void: {', '.join(each.void)} changed after the {each.proof}{next_step}"
        else:
            proof = _describe_proof(each)
        yield f"  certificate  of {each.backend} {proof}"
    if not found.certificates:
        yield f"  certificate  none; make one with: trtower {VERIFY if found.golden else CHECK} {found.path}"
        return
    known = {*found.altered, *(name for each in found.certificates for name in each.executed)}
    if not_run := [plan.file for plan in found.plans if plan.file not in known]:
        yield f"  NOT run      {', '.join(not_run)}: built, but not checked on a GPU"


def _describe_proof(certificate: Certificate) -> str:
    verdict = "passed" if certificate.passed else "FAILED"
    figures = certificate.bundle
    batches = ", ".join(str(each.batch) for each in certificate.batches)
    return (
        f"{verdict} the {certificate.proof} of {certificate.date}, "
        f"{len(certificate.images)} images, {batches} at once: "
        f"{certificate.describe_run()}; "
        f"token cosine at least {describe_figure(figures.token_cosine_min)}, "
        f"relative error {describe_figure(figures.relative_error)}"
    )


def describe_loading(bundle: Bundle) -> str:
    """Return the Python lines that load a bundle: by itself, and if it takes floats, into a model with this tower."""
    path = json.dumps(str(bundle.path), ensure_ascii=False)  # valid Python, too
    lines = [
        "Load it:",
        "  from trtower import VisionTower",
        f"  tower = VisionTower.load({path})",
        '  features = tower.encode(["photo.jpg"])',
    ]
    if bundle.manifest.spec.takes_floats and not bundle.manifest.spec.head:
        lines += [
            "Or install it in a loaded model that has this tower:",
            "  import trtower",
            f"  trtower.install(model, {path})",
        ]
    return "\n".join(lines)
