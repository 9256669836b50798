"""Race a bundle against the alternatives for running its tower, and measure how much of the hardware each uses.

entrants -> ceiling -> race (in turn, in this process) -> cold (each in its own process: load, first call, memory)
"""

import dataclasses
import gc
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trtower.bundle.bundle import Bundle
from trtower.errors import BackendError, ConfigError, TrtowerError, one_line
from trtower.names import check_name
from trtower.runners.base import Runner
from trtower.runners.race import batches_to_time, race
from trtower_export.bench.ceiling import measure_ceilings
from trtower_export.bench.entrants import LLAVA, TRTOWER, Arena, Entrant, competitors, enter, runner_of
from trtower_export.bench.environment import describe_environment
from trtower_export.bench.results import Benchmark, ColdStart, ListTiming, Timing
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.console import Progress

ROUNDS = {"cpu": 7, "cuda": 100}
"""How often each entrant runs, by kind of device."""

COLD_TIMEOUT_S = 1800
"""Timeout of one cold start, in seconds."""

COMPILATIONS = 64
"""How many batches may be compiled. Beyond its own limit, torch would silently fall back to eager."""

TILES = 16
"""Images in the list: about three pictures, as AnyRes splits them."""

LIST_ROUNDS = 3
"""The list runs at least this often, unless --rounds is less: a ratio of single runs means nothing."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to race. ``batches`` None means the profile's batches on a GPU, and only the minimum elsewhere."""

    batches: tuple[int, ...] | None = None
    against: tuple[str, ...] = field(default_factory=competitors)
    backend: str = "auto"
    rounds: int | None = None
    tiles: int = TILES

    def __post_init__(self) -> None:
        for name in self.against:
            check_name("competitor", name, competitors())
        if len(set(self.against)) < len(self.against):
            raise ConfigError(f"--against {','.join(self.against)} has a duplicate; name each competitor once.")
        if any(batch < 1 for batch in self.batches or ()):
            raise ConfigError(f"--batch {','.join(map(str, self.batches or ()))}: each must be at least 1.")


def run_benchmark(bundle: Bundle, checkpoint: Checkpoint, options: BenchOptions, progress: Progress) -> Benchmark:
    """Race the bundle against its competitors, then time the cold start of each in its own process.

    Raises BackendError if the bundle itself cannot run here, CheckpointError if it was exported from other weights than
    ``checkpoint`` has.
    """
    warm, entrants = _race_all(bundle, checkpoint, options, progress)
    gc.collect()  # free the towers: their memory and threads would disturb the cold starts
    cold = []
    batch = min(timing.batch for timing in warm.timings)
    for name, backend in entrants:
        with progress.step(f"Cold start of {name}"):
            device = warm.environment["device"]
            cold.append(_run_cold(bundle, checkpoint, name, backend, device, batch, warm.absent))
    return dataclasses.replace(warm, cold=tuple(each for each in cold if each))


def _race_all(
    bundle: Bundle, checkpoint: Checkpoint, options: BenchOptions, progress: Progress
) -> tuple[Benchmark, list[tuple[str, str | None]]]:
    """Run everything except the cold starts; return the result, and the name and backend of each entrant.

    All towers are freed on return.
    """
    with progress.step("Load the towers"):
        arena = Arena.open(bundle, checkpoint, options.backend)
    kind = arena.device.type
    batches = options.batches or batches_to_time(bundle.manifest, kind)
    rounds = options.rounds or ROUNDS[kind]
    entrants, absent = _enter_all(arena, options.against, progress)
    with progress.step("Measure the ceiling of the hardware"):
        ceilings = measure_ceilings(arena.device, {entrant.arithmetic for entrant in entrants})
    timings: list[Timing] = []
    for batch in sorted(set(batches)):
        each_compiled = torch._dynamo.config.patch(recompile_limit=COMPILATIONS, fail_on_recompile_limit_hit=True)
        with progress.step(f"Race at batch {batch}, {rounds} rounds"), each_compiled:
            timings += _race(arena, entrants, batch, rounds, ceilings, absent)
        if ours := next((each for each in timings if (each.entrant, each.batch) == (TRTOWER, batch)), None):
            ratio = "" if ours.times_llava is None else f", {ours.times_llava:.2f} times as fast as LLaVA's tower"
            progress.say(f"trtower at batch {batch}: {ours.median_s * 1e3:.1f} ms{ratio}")
    if not any(each.entrant == TRTOWER for each in timings):
        raise BackendError(f"{bundle.path} did not run: " + "; ".join(absent.values()))
    tiles = None
    if options.tiles:
        list_rounds = max(min(rounds, LIST_ROUNDS), rounds // 4)
        with progress.step(f"Race over a list of {options.tiles} images, {list_rounds} rounds"):
            tiles = _race_over_a_list(arena, entrants, options.tiles, list_rounds, absent)
    result = Benchmark(
        bundle=_describe_bundle(bundle, runner_of(arena.tower)),
        environment=describe_environment(arena.device),
        ceilings=ceilings,
        timings=tuple(timings),
        cold=(),
        tiles=tiles,
        absent=absent,
    )
    return result, [(entrant.name, entrant.backend) for entrant in entrants]


def _describe_bundle(bundle: Bundle, runner: Runner) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "name": manifest.name,
        "precision": manifest.precision,
        "random_weights": manifest.source.random_weights,
        "weights_sha256": manifest.source.weights_sha256["float32"],
        "certified": bundle.why_uncertified(runner.backend, runner.files) is None,
        "flop_an_image": manifest.cut.flop,
    }


def _enter_all(arena: Arena, names: Sequence[str], progress: Progress) -> tuple[list[Entrant], dict[str, str]]:
    entrants, absent = [enter(arena, TRTOWER), enter(arena, LLAVA)], {}
    for name in names:
        try:
            entrants.append(enter(arena, name))
        except TrtowerError as err:
            absent[name] = str(err)
            progress.say(f"{name} does not run: {err}")
    return entrants, absent


def _run_cold(
    bundle: Bundle,
    checkpoint: Checkpoint,
    name: str,
    backend: str | None,
    device: str,
    batch: int,
    absent: dict[str, str],
) -> ColdStart | None:
    """Load and call an entrant once in its own process; a bundle runs twice, so that its files are cached in memory."""
    arguments = {
        "bundle": str(bundle.path),
        "name": name,
        "backend": backend,
        "device": device,
        "batch": batch,
        "source": checkpoint.source,
        "trust": dataclasses.asdict(checkpoint.trust),
        **{name: getattr(checkpoint, name) for name in ("revision", "random_weights", "tower")},
    }
    command = [sys.executable, "-m", "trtower_export.bench.cold", json.dumps(arguments)]
    try:
        for _ in range(2 if backend else 1):
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=COLD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        absent[f"cold start of {name}"] = f"no answer after {COLD_TIMEOUT_S} s"
        return None
    results = [line for line in done.stdout.splitlines() if line.startswith('{"load_s"')]
    if done.returncode or not results:
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        absent[f"cold start of {name}"] = errors[-1]
        return None
    return ColdStart(entrant=name, **json.loads(results[-1]))


def _race(
    arena: Arena,
    entrants: Sequence[Entrant],
    batch: int,
    rounds: int,
    ceilings: dict[str, float],
    absent: dict[str, str],
) -> list[Timing]:
    """Race at one batch. Entrants that fail are recorded in ``absent``, and the others go on."""

    def drop(name: str, err: Exception) -> None:
        absent[f"{name} at batch {batch}"] = _shorten(err)

    try:
        images = arena.draw(batch)
        reference = arena.reference(images[:1])
    except RuntimeError as err:  # from torch, if memory runs out
        absent[f"batch {batch}"] = _shorten(err)
        return []
    calls, errors = {}, {}
    for entrant in entrants:
        try:
            prepared = entrant.prepare(images)
            errors[entrant.name] = _error(entrant.call(prepared)[:1], reference)
        except Exception as err:  # noqa: BLE001 - whether a compiler fails or memory runs out, the others go on
            drop(entrant.name, err)
            continue
        calls[entrant.name] = partial(entrant.call, prepared)
    seconds = race(calls, rounds=rounds, drop=drop)
    llava = statistics.median(seconds[LLAVA]) if LLAVA in seconds else None
    flop = batch * arena.bundle.manifest.cut.flop
    floors = {arithmetic: flop / ceiling for arithmetic, ceiling in ceilings.items()}
    return [
        _timing(each, batch, seconds[each.name], floors.get(each.arithmetic), llava, errors[each.name])
        for each in entrants
        if each.name in seconds
    ]


def _timing(
    entrant: Entrant, batch: int, seconds: list[float], floor: float | None, llava: float | None, error: float | None
) -> Timing:
    """Compute a timing from the seconds of each round, the floor, and the median of LLaVA's tower."""
    median = statistics.median(seconds)
    return Timing(
        entrant=entrant.name,
        runs_on=entrant.runs_on,
        arithmetic=entrant.arithmetic,
        batch=batch,
        rounds=len(seconds),
        median_s=median,
        p99_s=sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1],
        images_per_s=batch / median,
        share=floor / median if floor else None,
        times_llava=llava / median if llava else None,
        error=error,
    )


def _race_over_a_list(
    arena: Arena, entrants: Sequence[Entrant], count: int, rounds: int, absent: dict[str, str]
) -> ListTiming | None:
    """Time a list of images: LLaVA's tower loops over it, the bundle gets it in one call."""
    llava = next(entrant for entrant in entrants if entrant.name == LLAVA)
    try:
        images = list(arena.draw(count))
        one_by_one = [llava.prepare(image[None]) for image in images]
        prepared = [arena.for_bundle(image) for image in images]
        seconds = race(
            {LLAVA: lambda: [llava.call(image) for image in one_by_one], TRTOWER: lambda: arena.tower(prepared)},
            rounds=rounds,
        )
    except Exception as err:  # noqa: BLE001 - if the list does not fit, keep the measurements so far
        absent[f"a list of {count}"] = _shorten(err)
        return None
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return ListTiming(images=count, rounds=rounds, llava_s=medians[LLAVA], trtower_s=medians[TRTOWER])


def _shorten(err: Exception) -> str:
    """Shorten an error to one line that fits into a table."""
    return one_line(err)[:300]


def _error(features: Tensor, reference: Tensor) -> float | None:
    error = float((features.float() - reference).norm() / reference.norm())
    return error if math.isfinite(error) else None
