"""The result of a check against PyTorch, as stored in the manifest."""

import dataclasses

from trtower.errors import ConfigError
from trtower.names import check_name

CHECK, VERIFY = KINDS = ("check", "verify")
"""The kinds of certificates: against PyTorch, or against the bundle's golden answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """How far features are from FP32 PyTorch.

    ``token_cosine_*`` are the mean and minimum over the tokens. The error is ‖x - ref‖ / ‖ref‖: ``token_error_p999`` is
    its 99.9th percentile over the tokens, ``relative_error`` its value over all tokens together. ``max_abs_error`` is
    max |x - ref|. ``non_finite`` counts NaN and infinite values; if there are any, the other figures may be None (null
    in tower.json).
    """

    token_cosine_mean: float | None
    token_cosine_min: float | None
    token_error_p999: float | None
    relative_error: float | None
    max_abs_error: float | None
    non_finite: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFigures:
    """The figures of one image over all its batches: the bundle's, and those of PyTorch in the bundle's precision.

    ``kind`` is "photograph", or for a drawn image "noise", "constant" or "saturated".
    """

    name: str
    kind: str
    bundle: Figures
    torch: Figures | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """The bundle's figures over all images, with ``batch`` of them at once; a batch above the profile ran in pieces."""

    batch: int
    bundle: Figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """The figures of hidden state ``layer``, one of those up to the deepest state that is read.

    ``bundle`` is measured on the bundle's graph, on the CPU, even if the check ran a plan; ``torch`` is PyTorch in the
    bundle's precision. ``worst_image`` and ``worst_token`` say where the graph's error is largest. Tokens count from 0
    and include the prefix tokens.
    """

    layer: int
    bundle: Figures
    torch: Figures
    worst_image: str
    worst_token: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """One limit that the check requires a figure to meet.

    ``figure`` names a field of `Figures`, or is "relative_error_over_torch": the relative error divided by that of
    PyTorch in the bundle's precision. ``images`` says on which images: "photograph", or "drawn" for noise, constant and
    saturated ones. ``measured`` is the worst over all batches and ``as_typed``; None if one of them is not finite.
    """

    figure: str
    images: str
    limit: float
    measured: float | None
    holds: bool

    def describe(self) -> str:
        """Return one line: whether it holds, on which images, the figure, what was measured and what is required."""
        sign = ">=" if self.figure == "token_cosine_min" else "<="
        counted = self.figure == "non_finite" and self.measured is not None
        measured = f"{self.measured:.0f}" if counted else describe_figure(self.measured)
        limit = f"{sign} {self.limit:g}" if self.holds else f"(required {sign} {self.limit:g})"
        return f"{'holds' if self.holds else 'MISSED':<7}{self.images:<11}{self.figure} {measured} {limit}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """How well this bundle, on one backend, matches the uncut FP32 PyTorch tower.

    ``kind`` is "check" if PyTorch ran beside the bundle, and "verify" if the bundle was compared with its golden
    answers, where there is neither a checkpoint nor PyTorch's tower. A "verify" has no ``torch`` figures, ``layers``,
    ``as_typed`` or ``skipped`` files, and its ``images_sha256`` is that of the golden file.
    ``ran`` says whether ``backend`` ran a "plan" or the "graph", and ``runner`` is the backend with its version, such
    as "onnxruntime 1.32.0, CPU". ``executed`` names the files that it ran. ``files`` holds the sha256 of every file
    that the result depends on, including those; if one of them changes, the certificate is void. ``not_run`` names the
    plans that this check did not execute. ``gpu`` is the GPU's name, None if none was used. ``layers`` is empty unless
    the check measured every layer. ``as_typed`` are the figures of the graph in FP32 with every result rounded to its
    type, a rounding that CPU kernels leave out. Only FP16 and 8-bit bundles that ran on a CPU have them, and not if
    ``backend`` was an emulation, which rounds anyway; otherwise None.
    """

    passed: bool
    ran: str
    backend: str
    runner: str
    executed: tuple[str, ...]
    files: dict[str, str]
    not_run: tuple[str, ...]
    reference: str
    images: tuple[ImageFigures, ...]
    images_sha256: str
    skipped: tuple[str, ...]
    batches: tuple[BatchFigures, ...]
    as_typed: Figures | None
    layers: tuple[LayerFigures, ...]
    bundle: Figures
    torch: Figures | None
    bounds: tuple[Bound, ...]
    versions: dict[str, str]
    gpu: str | None
    machine: str
    date: str
    kind: str = CHECK

    def __post_init__(self) -> None:
        if not self.executed or not set(self.executed) <= self.files.keys():
            raise ConfigError(
                f"the certificate for {self.backend} executed {self.executed}; expected some of {[*self.files]}."
            )
        check_name("kind of certificate", self.kind, KINDS)
        if self.kind == CHECK and not all(self._of_torch):
            raise ConfigError(f"the certificate for {self.backend} is a check, but lacks figures of PyTorch.")
        if not self.bounds or self.passed != all(bound.holds for bound in self.bounds):
            raise ConfigError(f"the certificate for {self.backend} says passed={self.passed}, but its bounds do not.")

    @property
    def _of_torch(self) -> tuple[Figures | None, ...]:
        return self.torch, *(image.torch for image in self.images)

    @property
    def subject(self) -> tuple[str, str, tuple[str, ...], str | None]:
        """What was proved, and how: the kind, the backend, the files it executed and the GPU. One certificate each."""
        return self.kind, self.backend, self.executed, self.gpu

    @property
    def proof(self) -> str:
        """What made it, in words: "check" or "verification"."""
        return "check" if self.kind == CHECK else "verification"

    @property
    def missed(self) -> tuple[str, ...]:
        """The names of the figures whose bounds do not hold."""
        return tuple(dict.fromkeys(bound.figure for bound in self.bounds if not bound.holds))

    def describe_run(self) -> str:
        """Say what was executed, and on what."""
        subject = "the plan was run" if self.ran == "plan" else "the ONNX graph was run"
        return f"{subject} on {self.runner}, {self.gpu or 'without a GPU'}"


def describe_figure(value: float | None) -> str:
    """Format a certificate's figure: from 0.1 on with six decimals, as for a cosine; below in scientific notation."""
    if value is None:
        return "not finite"
    return f"{value:.6f}" if abs(value) >= 0.1 else f"{value:.2e}"
