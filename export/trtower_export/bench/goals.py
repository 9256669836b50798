"""Hold a benchmark against what trtower is meant to reach for CLIP ViT-L/14-336; a goal that is missed is said so."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtower.flavour import FLAVOURS
from trtower.runners.choose import find_backend
from trtower.spec import TowerSpec
from trtower_export.bench.entrants import LLAVA, TRTOWER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtower_export.bench.benchmark import ColdStart, ListTiming, Timing

YARDSTICK = ("clip", 336, 14, 1024, (23,))
"""Family, image size, patch size, width and what is read of the tower that the goals are set for."""

TILES = 16
"""Images in a list: what AnyRes makes of about three pictures."""

PLAN_BATCHES = (1, 8, 32)
OVER_SDPA = 1.5
OVER_COMPILE = 1.15
SHARE = 0.6
OVER_LOOP = 3.0
OVER_LLAVA = 4.0
FIRST_S = 2.0

WANTS_PLAN = "wants a GPU that runs a plan"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One thing that was aimed at: ``measured`` is None where it could not be, and ``note`` says why."""

    says: str
    limit: float
    measured: float | None
    met: bool
    note: str = ""


def judge_goals(
    spec: TowerSpec,
    backend: str,
    timings: "Sequence[Timing]",
    cold: "Sequence[ColdStart]",
    tiles: "ListTiming | None",
) -> tuple[Goal, ...]:
    """Judge every goal by what ran on ``backend``; what this machine cannot decide is named as not measured.

    Of another tower than the yardstick there is none.
    """
    if (spec.family, spec.image_size, spec.patch_size, spec.width, spec.layers) != YARDSTICK:
        return ()
    on_plan = backend in FLAVOURS
    medians = {(each.entrant, each.batch): each.median_s for each in timings}
    shares = {each.batch: each.share for each in timings if each.entrant == TRTOWER}
    first = next((each for each in cold if each.entrant == TRTOWER), None)

    def over(name: str, batch: int) -> float | None:
        if (TRTOWER, batch) in medians and (name, batch) in medians:
            return medians[name, batch] / medians[TRTOWER, batch]
        return None

    def at_least(says: str, limit: float, measured: float | None, wants: str) -> Goal:
        note = wants if measured is None else ""
        return Goal(
            says=says, limit=limit, measured=measured, met=measured is not None and measured >= limit, note=note
        )

    def why_not(*entrants: str, batch: int) -> str:
        if not on_plan:
            return WANTS_PLAN
        missing = [name for name in entrants if (name, batch) not in medians]
        return f"{' and '.join(missing)} did not run at batch {batch}" if missing else "its ceiling was not measured"

    goals = [
        at_least(
            f"{limit} times as fast as {name}, batch {batch}",
            limit,
            over(name, batch) if on_plan else None,
            why_not(TRTOWER, name, batch=batch),
        )
        for name, limit in (("sdpa", OVER_SDPA), ("compile", OVER_COMPILE))
        for batch in PLAN_BATCHES
    ]
    largest = max(PLAN_BATCHES)
    share = shares.get(largest) if on_plan else None
    says = f"{SHARE:.0%} of what a product reaches, batch {largest}"
    goals.append(at_least(says, SHARE, share, why_not(TRTOWER, batch=largest)))
    loop = tiles.llava_s / tiles.trtower_s if tiles and tiles.images >= TILES else None
    says = f"{OVER_LOOP} times LLaVA's loop over a list of {TILES}"
    goals.append(at_least(says, OVER_LOOP, loop, f"no list of {TILES} was raced"))
    if find_backend(backend).kind == "cpu":
        says = f"{OVER_LLAVA} times as fast as LLaVA's FP32 tower on a CPU, batch 1"
        goals.append(at_least(says, OVER_LLAVA, over(LLAVA, 1), "one of the two did not run at batch 1"))
    seconds = first.load_s + first.first_s if first and first.load_s is not None else None
    goals.append(
        Goal(
            says=f"first features {FIRST_S} s after load() was called, or sooner",
            limit=FIRST_S,
            measured=seconds,
            met=seconds is not None and seconds <= FIRST_S,
            note="" if seconds is not None else "it did not run alone",
        )
    )
    return tuple(goals)
