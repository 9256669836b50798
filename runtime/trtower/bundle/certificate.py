"""The result of a check against PyTorch, as the manifest keeps it."""

import dataclasses

from trtower.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """How far features are from FP32 PyTorch.

    ``token_cosine_*`` over the tokens; ``token_error_p999`` is the 99.9th percentile over the tokens, and
    ``relative_error`` is over all of them together, of ‖x - ref‖ / ‖ref‖; ``max_abs_error`` = max |x - ref|;
    ``non_finite`` counts values that are NaN or infinite. Where any is, the others may be NaN, written as null.
    """

    token_cosine_mean: float | None
    token_cosine_min: float | None
    token_error_p999: float | None
    relative_error: float | None
    max_abs_error: float | None
    non_finite: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFigures:
    """The figures of one image over every batch it was in: the bundle's, and PyTorch's in the bundle's own precision.

    ``kind`` is "photograph", or what was drawn in its place: "noise", "constant", "saturated".
    """

    name: str
    kind: str
    bundle: Figures
    torch: Figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """The bundle's figures with ``batch`` images at once, over all images. Beyond the profile it ran in pieces."""

    batch: int
    bundle: Figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """The figures of hidden state ``layer`` on its way to the one that is read, and where the bundle's are worst.

    ``worst_token`` counts from 0, prefix tokens included.
    """

    layer: int
    bundle: Figures
    torch: Figures
    worst_image: str
    worst_token: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """One thing the check demanded: ``figure`` is the limit's name, e.g. "token_cosine_min".

    ``images`` says of what: "photograph", or "drawn" for noise, constant and saturated images. ``measured`` is the
    worst of every batch, and of ``as_typed``.
    """

    figure: str
    images: str
    limit: float
    measured: float | None
    holds: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """The parity with the uncut FP32 PyTorch tower of this bundle on one backend.

    ``ran`` is what was executed, "plan" or "graph", on ``backend``, in ``runner``'s words; ``executed`` are its files,
    and ``files`` the sha256 of everything that the result depends on, these among them: another in its place makes the
    certificate void. ``not_run`` names the plans that were built and not executed in this check. ``gpu`` is its name,
    None where none was used. ``layers`` is empty where nobody asked for them. ``as_typed`` are the figures of the graph
    in FP32 with every result rounded to its type, which kernels for the CPU leave out; None where the bundle ran on a
    GPU, in FP32, or in such an emulation.
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
    torch: Figures
    bounds: tuple[Bound, ...]
    versions: dict[str, str]
    gpu: str | None
    machine: str
    date: str

    def __post_init__(self) -> None:
        if not self.executed or not set(self.executed) <= self.files.keys():
            raise ConfigError(f"a certificate of {self.backend} executed {self.executed}, of {[*self.files]}.")
        if not self.bounds or self.passed != all(bound.holds for bound in self.bounds):
            raise ConfigError(f"a certificate of {self.backend} says passed={self.passed}, and its bounds do not.")

    @property
    def missed(self) -> tuple[str, ...]:
        """The figures whose bounds do not hold."""
        return tuple(dict.fromkeys(bound.figure for bound in self.bounds if not bound.holds))

    def describe_run(self) -> str:
        """Say what was executed, and where."""
        subject = "the plan was run" if self.ran == "plan" else "the ONNX graph was run"
        return f"{subject} on {self.runner}, {self.gpu or 'not run on a GPU'}"
