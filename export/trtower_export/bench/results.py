"""What a benchmark measured, as `--json` writes it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One entrant at one batch: seconds over ``rounds``, images a second, and what it is of two yardsticks.

    ``share`` is the floor over the median, the floor being the cut tower's FLOP over what a large matrix product
    reaches here in the same ``arithmetic``; None where that was not measured. ``times_llava`` is LLaVA's median over
    this one's. ``error`` is ‖x - ref‖ / ‖ref‖ on the first image, against the cut tower in FP32; None where that is
    not finite.
    """

    entrant: str
    runs_on: str
    arithmetic: str
    batch: int
    rounds: int
    median_s: float
    p99_s: float
    images_per_s: float
    share: float | None
    times_llava: float | None
    error: float | None


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """One entrant alone in a process of its own, at the smallest batch: seconds, and bytes at the peak.

    torch is imported before, and the backend is not. ``load_s`` is from files to something that can be called, None
    where there are no files because weights are drawn; ``first_s`` is the first call. On a GPU ``peak_bytes`` is what
    the device lost, elsewhere the resident set.
    """

    entrant: str
    load_s: float | None
    first_s: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class ListTiming:
    """A list of images: LLaVA's loop and the bundle's batches, median seconds."""

    images: int
    rounds: int
    llava_s: float
    trtower_s: float


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Everything that was measured in one run. ``absent`` says of each entrant that could not run why not."""

    bundle: dict[str, Any]
    environment: dict[str, Any]
    ceilings: dict[str, float]
    timings: tuple[Timing, ...]
    cold: tuple[ColdStart, ...]
    tiles: ListTiming | None
    absent: dict[str, str]
