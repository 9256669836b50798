"""The results of a benchmark, as `--json` writes them."""

from dataclasses import dataclass
from typing import Any

COMPILED = "-compile"
"""Follows the name of a backend as an entrant that compiles (`EngineOptions.compile`)."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One entrant at one batch: seconds over ``rounds``, images per second, and two ratios.

    ``share`` is floor / median. The floor is the FLOP of the whole batch in the cut tower, divided by the FLOP per
    second of a large matrix product on this machine in the same ``arithmetic``; None if no product was measured in it.
    ``times_llava`` is LLaVA's median divided by this one; None if LLaVA's tower did not run. ``error`` is
    ‖x - ref‖ / ‖ref‖ on the first image, against the cut tower in FP32; None if it is not finite.
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
    """One entrant in its own process, at the smallest batch.

    torch was imported before the clock started, but not the backend. ``load_s`` is the seconds from files to something
    that can be called; None for PyTorch in a rehearsal, which has no files. ``first_s`` is the seconds of the first
    call. ``peak_bytes`` is the memory taken from the GPU, or the peak resident set on a CPU.
    """

    entrant: str
    load_s: float | None
    first_s: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class ListTiming:
    """A list of images: median seconds of LLaVA's loop and of one call of the bundle."""

    images: int
    rounds: int
    llava_s: float
    trtower_s: float


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Everything that was measured in one run.

    ``absent`` maps what did not run to the reason: an entrant, an entrant at one batch, its cold start, a batch, or the
    list.
    """

    bundle: dict[str, Any]
    environment: dict[str, Any]
    ceilings: dict[str, float]
    timings: tuple[Timing, ...]
    cold: tuple[ColdStart, ...]
    tiles: ListTiming | None
    absent: dict[str, str]
