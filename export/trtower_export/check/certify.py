"""Run a bundle and the full, uncut PyTorch tower on the same images, and measure how far apart they are.

The reference is transformers' own forward pass in FP32 with every layer in place. A tower that was cut one layer off,
or traced wrongly, cannot match it. PyTorch also runs in the bundle's own precision: its error is the error of the
eager tower that the bundle replaces, and the bundle is judged against it. Some engines were wrong at a single batch
size, so the check runs the minimum, optimum and maximum of every profile, and one batch that has to be split.

CPU backends compute FP16 in FP32 and skip the rounding between operations, which can hide an overflow. If an FP16
bundle runs on the CPU, the check therefore runs the graph once more and rounds every result to its type.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import BatchFigures, Certificate, Figures, ImageFigures
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, PREPROCESSOR, Manifest
from trtower.bundle.staging import check_writable, disk_errors, locked
from trtower.dtypes import DTYPES
from trtower.errors import CheckpointError, ConfigError
from trtower.parity.bounds import DRAWN, PHOTOGRAPH, judge
from trtower.parity.metrics import MetricSums, total
from trtower.parity.runs import describe_run, refuse_altered, run_in_batches
from trtower.runners.base import Runner, run_batch
from trtower.runners.choose import candidates, choose
from trtower.spec import BatchProfile, merge_profiles, profile_batches
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.emulation import EMULATED, EmulatedRunner
from trtower_export.check.evidence import ImageEvidence
from trtower_export.check.layers import GraphStates, LayerSums
from trtower_export.check.photographs import (
    Photograph,
    Photographs,
    channels_first,
    draw_images,
    prepare,
    prepare_floats,
)
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.console import Progress
from trtower_export.graph.reference import UncutTower
from trtower_export.graph.truncate import TruncatedTower
from trtower_export.precision.quantisation import read_quantised, simulate_quantised

WAIT_S = 600.0
"""How long to wait while another process writes into the bundle. Giving up would throw away minutes of measuring."""

OnImage = Callable[[ImageEvidence], None]
"""Called with the features of each image, for example to build a report."""


def certify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    photographs: Photographs,
    *,
    backend: str = "auto",
    quick: bool = False,
    by_layer: bool = False,
    progress: Progress,
    on_image: OnImage | None = None,
) -> Certificate:
    """Check ``bundle`` on photographs and drawn images, and return the certificate without writing it.

    Args:
        bundle: the bundle to check.
        checkpoint: the checkpoint that it was exported from.
        photographs: the photographs to run both towers on.
        backend: the backend to run the bundle on, or "emulated-fp16" or "emulated-bf16"; "auto" picks the best.
        quick: use only the photographs, and only the smallest batch.
        by_layer: also compare every hidden state up to the one that is read.
        progress: reports each step.
        on_image: called with the evidence of each image.

    Returns:
        The certificate. Its ``passed`` says whether every bound holds.

    Raises:
        BackendError: if no backend on this machine can run the bundle.
        BundleError: if any file of the bundle was altered, even one that does not run here.
        CheckpointError: if ``checkpoint`` has other weights than the bundle, or is not finite in FP32.
        ConfigError: if an emulated ``backend`` is for another precision than the bundle's.
        InputError: if the bundle's image processor rejects an image.
        MissingExtraError: if ONNX Runtime is needed for an emulation or for ``by_layer``, and is not installed.
    """
    towers = _load_towers(bundle, checkpoint, backend, progress, by_layer=by_layer)
    manifest = bundle.manifest
    images = [*photographs.images, *([] if quick else draw_images(manifest.spec.image_size))]
    batches = [manifest.batch.min] if quick else batches_of(manifest.profiles)
    comparison = _Comparison(batches=batches)
    title = f"Compare {len(images)} images, at batch {', '.join(map(str, batches))}"
    with closing(towers.runner), progress.step(title) as step, torch.no_grad():
        for start in range(0, len(images), max(batches)):
            step.update(start / len(images), f"from {images[start].name}")
            _compare(towers, images[start : start + max(batches)], comparison, on_image)
    return _make_certificate(towers, comparison, images, photographs)


def check_bundle(
    bundle: Bundle, checkpoint: Checkpoint, photographs: Photographs, progress: Progress, **options: Any
) -> Bundle:
    """Check a bundle against PyTorch and write the certificate into it, whether it passed or not.

    Args:
        bundle: the bundle to check; its folder must be writable.
        checkpoint: the checkpoint that it was exported from.
        photographs: the photographs to run both towers on.
        progress: reports each step.
        **options: the other options of `certify`: ``backend``, ``quick``, ``by_layer`` and ``on_image``.

    Returns:
        The bundle with its new certificate.

    Raises:
        BackendError: if no backend on this machine can run the bundle.
        BundleError: if the bundle is read-only, if any of its files was altered, or if another process is still writing
            into it after ten minutes.
        CheckpointError: if ``checkpoint`` has other weights than the bundle, or is not finite in FP32.
        ConfigError: if an emulated ``backend`` is for another precision than the bundle's.
        InputError: if the bundle's image processor rejects an image.
        MissingExtraError: if ONNX Runtime is needed for an emulation or for ``by_layer``, and is not installed.
    """
    check_writable(bundle.path, "check a writable copy.")
    certificate = certify(bundle, checkpoint, photographs, progress=progress, **options)
    with disk_errors(bundle.path), locked(bundle.path, wait_s=WAIT_S):
        return bundle.add_certificate(certificate)


def batches_of(profiles: Sequence[BatchProfile]) -> list[int]:
    """List the batches to check: each minimum, optimum and maximum, and the largest plus one, which takes two calls."""
    return [*profile_batches(profiles), merge_profiles(profiles).max + 1]


@dataclass(frozen=True, kw_only=True)
class _Towers:
    """What is compared: the full model in FP32, the cut tower in the bundle's precision, and the bundle.

    ``typed`` runs the bundle's graph with every result rounded to its type.
    """

    bundle: Bundle
    uncut: UncutTower
    own: TruncatedTower
    runner: Runner
    typed: EmulatedRunner | None
    states: GraphStates | None


RunKey: TypeAlias = int | str
"""A batch of the bundle, or one of two more runs: PyTorch in its precision, and its graph with rounded results."""
TORCH, TYPED = "torch", "typed"


@dataclass(kw_only=True)
class _Comparison:
    """What was measured so far, by run and by the image's id(), because two photographs may share a name."""

    batches: Sequence[int]
    sums: dict[tuple[RunKey, int], MetricSums] = field(default_factory=lambda: defaultdict(MetricSums))
    layers: LayerSums = field(default_factory=LayerSums)

    def figures(self, runs: Iterable[RunKey], images: Sequence[Photograph]) -> Figures:
        """Compute the figures over all these runs and images together."""
        return total(self.sums[run, id(image)] for run in runs for image in images).figures()


def _load_towers(
    bundle: Bundle, checkpoint: Checkpoint, backend: str, progress: Progress, *, by_layer: bool
) -> _Towers:
    """Verify every file of the bundle, open what runs it, and load PyTorch's towers."""
    manifest = bundle.manifest
    runner = _open(bundle, backend)
    refuse_altered(bundle, runner)
    emulated = isinstance(runner, EmulatedRunner) or manifest.precision == "bf16"  # no BF16 kernels on the CPU
    half = manifest.output.dtype == "float16" and runner.device.type == "cpu" and not emulated
    states = GraphStates(bundle, emulated=emulated) if by_layer else None
    with progress.step("Load PyTorch's tower"):
        uncut = UncutTower.load(checkpoint, manifest.spec)
        check_weights(uncut, manifest)
        own = _in_precision(copy.deepcopy(uncut.cut()), bundle)
    return _Towers(
        bundle=bundle,
        uncut=uncut,
        own=own.to(runner.device),
        runner=runner,
        typed=EmulatedRunner(bundle, worst=False) if half else None,
        states=states,
    )


def _compare(towers: _Towers, images: Sequence[Photograph], comparison: _Comparison, on_image: OnImage | None) -> None:
    """Run ``images`` through PyTorch one by one, and through the bundle at every batch size."""
    manifest, runner = towers.bundle.manifest, towers.runner
    processor = ImageProcessor.from_file(towers.bundle.verify(PREPROCESSOR))
    pixels, floats = prepare(images, processor), prepare_floats(images, processor, manifest.spec)
    references, owns, parts = [], [], manifest.spec.parts
    for image, engine_input, pixel_values in zip(images, pixels, floats, strict=True):
        states = towers.uncut.states(image.name, pixel_values)
        references.append(towers.uncut.expect(image.name, states))
        own_states = towers.own.states(pixel_values.to(runner.device, next(towers.own.parameters()).dtype))
        owns.append(towers.own.read(own_states).float().cpu())
        comparison.sums[TORCH, id(image)] = MetricSums.of(owns[-1], references[-1], parts)
        if towers.typed:
            repeated = engine_input.repeat(manifest.batch.min, 1, 1, 1).to(runner.pixel_dtype)
            (row, *_) = run_batch(towers.typed, manifest.batch, manifest.output, repeated)
            comparison.sums[TYPED, id(image)] = MetricSums.of(row[None].float(), references[-1], parts)
        if towers.states:
            of_graph = towers.states.run(engine_input)
            comparison.layers.add(image.name, states, of_graph, own_states, manifest.spec.towers)
    features: dict[int, Tensor] = {}
    for batch in comparison.batches:
        for member, row in run_in_batches(runner, manifest, pixels, batch):
            features.setdefault(member, row)
            comparison.sums[batch, id(images[member])].add(MetricSums.of(row[None], references[member], parts))
    for index, image in enumerate(images):
        evidence = ImageEvidence(
            name=image.name,
            kind=image.kind,
            pixel_values=channels_first(pixels[index][0].to(runner.pixel_dtype).float(), manifest.spec),
            reference=references[index][0],
            bundle=features[index],
            torch=owns[index][0],
        )
        if on_image:
            on_image(evidence)


def _make_certificate(
    towers: _Towers, comparison: _Comparison, images: Sequence[Photograph], photographs: Photographs
) -> Certificate:
    """Judge the measurements by the bounds, and record them with the setup they were measured on."""
    manifest, runner = towers.bundle.manifest, towers.runner
    batches, figures = comparison.batches, comparison.figures
    runs: list[RunKey] = [*batches, *([TYPED] if towers.typed else [])]
    drawn = [image for image in images if image.kind != PHOTOGRAPH]
    kinds = {PHOTOGRAPH: photographs.images} | ({DRAWN: drawn} if drawn else {})
    measured = {kind: ([figures([run], of) for run in runs], figures([TORCH], of)) for kind, of in kinds.items()}
    bounds = judge(manifest.precision, measured)
    graphs = [name for name in (GRAPH, FUSED_GRAPH) if name in manifest.files]  # the emulation reads either
    return Certificate(
        passed=all(bound.holds for bound in bounds),
        reference=towers.uncut.describe(),
        images=tuple(
            ImageFigures(
                name=image.name, kind=image.kind, bundle=figures(batches, [image]), torch=figures([TORCH], [image])
            )
            for image in images
        ),
        images_sha256=photographs.sha256,
        skipped=photographs.skipped,
        batches=tuple(BatchFigures(batch=batch, bundle=figures([batch], images)) for batch in batches),
        as_typed=figures([TYPED], images) if towers.typed else None,
        layers=comparison.layers.figures(),
        bundle=figures(batches, images),
        torch=figures([TORCH], images),
        bounds=bounds,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        **describe_run(towers.bundle, runner, graphs),
    )


def _in_precision(tower: TruncatedTower, bundle: Bundle) -> TruncatedTower:
    """Convert PyTorch's tower to the bundle's precision; simulate 8 bits with the bundle's own scales."""
    manifest = bundle.manifest
    if manifest.calibration is None:
        return tower.to(DTYPES[manifest.output.dtype])
    return simulate_quantised(tower, manifest.precision, read_quantised(bundle))


def _open(bundle: Bundle, backend: str) -> Runner:
    """Open the runner that a tower would use; emulate a BF16 bundle if no backend here can run it."""
    stuck = all(candidate.obstacle for candidate in candidates(bundle))
    if backend == "auto" and bundle.manifest.precision == "bf16" and stuck:
        backend = "emulated-bf16"
    if backend in EMULATED:
        if EMULATED[backend] != bundle.manifest.precision:
            raise ConfigError(
                f"--backend {backend} is for {EMULATED[backend]} bundles, but {bundle.path} is "
                f"{bundle.manifest.precision}: use --backend auto."
            )
        return EmulatedRunner(bundle, worst=True)
    return choose(bundle, backend)


def check_weights(uncut: UncutTower, manifest: Manifest) -> None:
    """Raise CheckpointError unless a full tower and its head have the weights that the bundle was exported from."""
    same = uncut.weights_sha256() == manifest.source.weights_sha256["float32"]
    if not same or uncut.head_sha256() != manifest.source.head_sha256:
        raise CheckpointError(
            f"the weights at {uncut.checkpoint.source} are not the ones that {manifest.name} was exported from (then "
            f"at {manifest.source.checkpoint}): pass the checkpoint that has those with --checkpoint, or export again."
        )
