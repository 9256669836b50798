"""Prove an engine on the device that runs it, with the runtime alone: compare it with the bundle's golden answers.

`trtower check` is the thorough way, on a machine with the checkpoint. Both hold an engine to the same bounds, except
for the one relative to PyTorch's own error, for which PyTorch's tower would have to run.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import VERIFY, BatchFigures, Bound, Certificate, Figures, ImageFigures, describe_figure
from trtower.bundle.manifest import GOLDEN
from trtower.bundle.staging import WAIT_S, check_writable, disk_errors, locked
from trtower.bundle.suggest import proof_command
from trtower.errors import BackendError
from trtower.parity.bounds import DRAWN, PHOTOGRAPH, judge
from trtower.parity.golden import Golden, select_tokens
from trtower.parity.metrics import MetricSums, total
from trtower.parity.runs import describe_run, refuse_altered, run_in_batches
from trtower.runners.base import Runner
from trtower.runners.choose import choose
from trtower.spec import profile_batches

OnBatch = Callable[[int], None]
"""Called with each batch size before it runs."""


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """What was measured: by the size of the batch and the place of the image among the golden ones."""

    bundle: Bundle
    golden: Golden
    sums: dict[tuple[int, int], MetricSums] = field(default_factory=lambda: defaultdict(MetricSums))

    def add(self, runner: Runner, size: int) -> None:
        """Run batches of this size."""
        golden, parts = self.golden, self.bundle.manifest.spec.parts
        for member, features in run_in_batches(runner, self.bundle.manifest, golden.pixel_values.split(1), size):
            found = select_tokens(features, golden.tokens, self.bundle.manifest.output)
            self.sums[size, member].add(MetricSums.of(found, golden.answers[member], parts))

    def figures(self, sizes: Iterable[int], members: Iterable[int]) -> Figures:
        """Compute the figures over all these batches and images together."""
        members = [*members]
        return total(self.sums[size, member] for size in sizes for member in members).figures()

    def judge(self, sizes: Iterable[int]) -> tuple[Bound, ...]:
        """Hold the worst batch to the bounds, on photographs and on drawn images."""
        places: dict[str, list[int]] = {}
        for place, image in enumerate(self.golden.images):
            places.setdefault(PHOTOGRAPH if image.kind == PHOTOGRAPH else DRAWN, []).append(place)
        sizes = [*sizes]
        measured = {kind: ([self.figures([size], of) for size in sizes], None) for kind, of in places.items()}
        return judge(self.bundle.manifest.precision, measured)


@torch.no_grad()
def verify(
    bundle: Bundle,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    on_batch: OnBatch = lambda size: None,
) -> Certificate:
    """Run every batch size of the profiles on the golden inputs, and return the certificate without writing it.

    Args:
        bundle: The bundle to verify.
        backend: The backend to run it on, as in `VisionTower.load`.
        device: Where to run it, as in `VisionTower.load`.
        on_batch: Called with each batch size before it runs.

    Returns:
        The certificate. Its ``passed`` says whether every bound holds.

    Raises:
        BundleError: The bundle has no golden answers, or any of its files was altered.
        BackendError: No requested backend can run the bundle here.
        ConfigError: ``backend`` or ``device`` is unknown.
    """
    golden, manifest = Golden.read(bundle), bundle.manifest
    comparison = _Comparison(bundle=bundle, golden=golden)
    sizes = profile_batches(manifest.profiles)
    with closing(choose(bundle, backend, device)) as runner:
        refuse_altered(bundle, runner)
        for size in sizes:
            on_batch(size)
            comparison.add(runner, size)
        run = describe_run(bundle, runner, [GOLDEN])
    bounds, places = comparison.judge(sizes), range(len(golden.images))
    return Certificate(
        kind=VERIFY,
        passed=all(bound.holds for bound in bounds),
        reference=golden.reference,
        images=tuple(
            ImageFigures(name=image.name, kind=image.kind, bundle=comparison.figures(sizes, [place]), torch=None)
            for place, image in enumerate(golden.images)
        ),
        images_sha256=manifest.files[GOLDEN].sha256,
        skipped=(),
        batches=tuple(BatchFigures(batch=size, bundle=comparison.figures([size], places)) for size in sizes),
        as_typed=None,
        layers=(),
        bundle=comparison.figures(sizes, places),
        torch=None,
        bounds=bounds,
        versions={"torch": torch.__version__},
        **run,
    )


def verify_bundle(
    bundle: Bundle,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    on_batch: OnBatch = lambda size: None,
) -> Bundle:
    """Compare a bundle with its golden answers, and write the certificate into it, whether it passed or not.

    This needs a backend and nothing else: neither the checkpoint, nor transformers, nor onnx.

    Args:
        bundle: The bundle to verify; its folder must be writable.
        backend: The backend to run it on, as in `VisionTower.load`.
        device: Where to run it, as in `VisionTower.load`.
        on_batch: Called with each batch size before it runs.

    Returns:
        The bundle with its new certificate, which is `bundle.manifest.certificate`.

    Raises:
        BundleError: The bundle has no golden answers, any of its files was altered, or its folder is read-only or being
            written by another process.
        BackendError: No requested backend can run the bundle here.
        ConfigError: ``backend`` or ``device`` is unknown.
    """
    check_certifiable(bundle)
    return write_certificate(bundle, verify(bundle, backend=backend, device=device, on_batch=on_batch))


def check_certifiable(bundle: Bundle) -> None:
    """Raise BundleError if `write_certificate` could not write."""
    check_writable(bundle.path, "verify a writable copy, or load it with verify=True, which writes nothing.")


def write_certificate(bundle: Bundle, certificate: Certificate) -> Bundle:
    """Add a certificate to a bundle. Raises BundleError if another process keeps writing into it."""
    with disk_errors(bundle.path), locked(bundle.path, wait_s=WAIT_S):
        return bundle.add_certificate(certificate)


def as_text(bundle: Bundle, certificate: Certificate) -> str:
    """Return a certificate of `verify` as text."""
    golden = Golden.read(bundle)
    rows = [(image.name, image.bundle) for image in certificate.images]
    rows += [(f"batch {each.batch}", each.bundle) for each in certificate.batches]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':<{width}}  {'cosine min':>10}  {'error p99.9':>11}  {'rel. error':>10}  {'NaN/inf':>7}"]
    for name, figures in rows:
        cosine, tail, error = map(
            describe_figure, (figures.token_cosine_min, figures.token_error_p999, figures.relative_error)
        )
        lines.append(f"{name:<{width}}  {cosine:>10}  {tail:>11}  {error:>10}  {figures.non_finite:>7}")
    lines += [f"  {bound.describe()}" for bound in certificate.bounds]
    tokens, _ = bundle.manifest.output.vectors
    verdict = "passed" if certificate.passed else "FAILED"
    rehearsal = " (rehearsal with random weights)" if bundle.manifest.source.random_weights else ""
    compared = f"{len(golden.tokens)} of {tokens} tokens of each image" if tokens > 1 else "one vector an image"
    lines.append(f"{verdict}{rehearsal}: {certificate.describe_run()}. Reference: {certificate.reference}, {compared}")
    if not certificate.passed:
        lines.append(
            "Verify the other backends, too. If one passes, the graph is right and this engine is not: build its plan "
            "again. If none does, the graph itself is wrong, or the precision too coarse: export again."
        )
    return "\n".join(lines)


@torch.no_grad()
def refuse_wrong(bundle: Bundle, runner: Runner, golden: Golden | None = None) -> None:
    """Run the golden inputs as one batch; raise BackendError if any bound is missed.

    They are read from the bundle if ``golden`` is None. Raises BundleError if it has none.
    """
    golden, profile = golden or Golden.read(bundle), bundle.manifest.batch
    size = min(max(len(golden.images), profile.min), profile.max)
    comparison = _Comparison(bundle=bundle, golden=golden)
    comparison.add(runner, size)
    if missed := [bound.describe() for bound in comparison.judge([size]) if not bound.holds]:
        raise BackendError(
            f"{bundle.path} is wrong on {runner.name}, so it is not served: {'; '.join(missed)}. To measure every "
            f"batch size, run: {proof_command(bundle, runner.backend)}"
        )
