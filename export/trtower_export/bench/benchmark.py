"""Race a bundle against what else could run its tower, and say what share of the hardware each uses.

entrants -> ceiling -> race (in turn, in this process) -> cold (each alone: load, first answer, memory)
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
from trtower.spec import merge_profiles, profile_batches
from trtower_export.bench.ceiling import measure_ceilings
from trtower_export.bench.entrants import LLAVA, TRTOWER, Arena, Entrant, competitors, enter, runner_of
from trtower_export.bench.environment import describe_environment
from trtower_export.bench.race import race
from trtower_export.bench.results import Benchmark, ColdStart, ListTiming, Timing
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.console import Progress

ROUNDS = {"cpu": 7, "cuda": 100}
"""How often each entrant runs, by the kind of device."""

ALONE_S = 1800
"""Seconds after which one alone is given up."""

COMPILATIONS = 64
"""How many batches may be compiled; beyond that torch would give one up for eager without a word."""

TILES = 16
"""Images in a list: what AnyRes makes of about three pictures."""

LIST_ROUNDS = 3
"""How often a list is run at the least, unless fewer rounds are asked for: a ratio of one run is none."""

SEED = 0


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to race: ``batches`` (None: the profile's on a GPU, its minimum elsewhere), ``against`` whom, how often."""

    batches: tuple[int, ...] | None = None
    against: tuple[str, ...] = field(default_factory=competitors)
    backend: str = "auto"
    rounds: int | None = None
    tiles: int = TILES

    def __post_init__(self) -> None:
        for name in self.against:
            check_name("competitor", name, competitors())
        if len(set(self.against)) < len(self.against):
            raise ConfigError(f"--against {','.join(self.against)} names one twice.")
        if any(batch < 1 for batch in self.batches or ()):
            raise ConfigError(f"--batch {','.join(map(str, self.batches or ()))}: each must be at least 1.")


def run_benchmark(bundle: Bundle, checkpoint: Checkpoint, options: BenchOptions, progress: Progress) -> Benchmark:
    """Measure all of it.

    Raises BackendError where the bundle itself cannot run here, CheckpointError where the checkpoint is not its own.
    """
    found, entrants = _race_all(bundle, checkpoint, options, progress)
    gc.collect()  # of the towers, whose memory and threads would be in the way of those that load alone
    cold = []
    batch = min(timing.batch for timing in found.timings)
    for name, backend in entrants:
        with progress.step(f"{name}, alone"):
            device = found.environment["device"]
            cold.append(_run_cold(bundle, checkpoint, name, backend, device, batch, found.absent))
    return dataclasses.replace(found, cold=tuple(each for each in cold if each))


def _race_all(
    bundle: Bundle, checkpoint: Checkpoint, options: BenchOptions, progress: Progress
) -> tuple[Benchmark, list[tuple[str, str | None]]]:
    """Return the benchmark as far as one process makes it, and who raced, with trtower's name for the backend of each.

    No tower outlives it.
    """
    profiles = bundle.manifest.profiles
    with progress.step("Load the towers"):
        arena = Arena.open(bundle, checkpoint, options.backend)
    kind = arena.device.type
    batches = options.batches or (
        tuple(profile_batches(profiles)) if kind == "cuda" else (merge_profiles(profiles).min,)
    )
    rounds = options.rounds or ROUNDS[kind]
    entrants, absent = _enter_all(arena, options.against, progress)
    with progress.step("Measure what the hardware can do"):
        ceilings = measure_ceilings(arena.device, {entrant.arithmetic for entrant in entrants})
    timings: list[Timing] = []
    for batch in sorted(set(batches)):
        each_compiled = torch._dynamo.config.patch(recompile_limit=COMPILATIONS, fail_on_recompile_limit_hit=True)
        with progress.step(f"Race at batch {batch}, {rounds} rounds"), each_compiled:
            timings += _race(arena, entrants, batch, rounds, ceilings, absent)
        if ours := next((each for each in timings if (each.entrant, each.batch) == (TRTOWER, batch)), None):
            ratio = "" if ours.times_llava is None else f", {ours.times_llava:.2f} times as fast as LLaVA's way"
            progress.say(f"trtower at batch {batch}: {ours.median_s * 1e3:.1f} ms{ratio}")
    if not any(each.entrant == TRTOWER for each in timings):
        raise BackendError(f"{bundle.path} did not run: " + "; ".join(absent.values()))
    tiles = None
    if options.tiles:
        often = max(min(rounds, LIST_ROUNDS), rounds // 4)
        with progress.step(f"Race over a list of {options.tiles} images, {often} rounds"):
            tiles = _race_over_a_list(arena, entrants, options.tiles, often, absent)
    found = Benchmark(
        bundle=_describe_bundle(bundle, runner_of(arena.tower)),
        environment=describe_environment(arena.device),
        ceilings=ceilings,
        timings=tuple(timings),
        cold=(),
        tiles=tiles,
        absent=absent,
    )
    return found, [(entrant.name, entrant.backend) for entrant in entrants]


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
    """Load and call an entrant once in a process of its own; a bundle's second time, when its files are in memory."""
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
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=ALONE_S)
    except subprocess.TimeoutExpired:
        absent[f"{name}, alone"] = f"it had not answered after {ALONE_S} s"
        return None
    told = [line for line in done.stdout.splitlines() if line.startswith('{"load_s"')]
    if done.returncode or not told:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        absent[f"{name}, alone"] = words[-1]
        return None
    return ColdStart(entrant=name, **json.loads(told[-1]))


def _race(
    arena: Arena,
    entrants: Sequence[Entrant],
    batch: int,
    rounds: int,
    ceilings: dict[str, float],
    absent: dict[str, str],
) -> list[Timing]:
    """Race at one batch; who cannot run it is named in ``absent``, and the others go on."""

    def drop(name: str, err: Exception) -> None:
        absent[f"{name} at batch {batch}"] = _words(err)

    try:
        images = draw_images(arena, batch)
        reference = arena.reference(images[:1])
    except RuntimeError as err:  # torch's, for want of memory
        absent[f"batch {batch}"] = _words(err)
        return []
    calls, errors = {}, {}
    for entrant in entrants:
        try:
            given = entrant.prepare(images)
            errors[entrant.name] = _error(entrant.call(given)[:1], reference)
        except Exception as err:  # noqa: BLE001 - whatever a compiler or a full memory says, the others go on
            drop(entrant.name, err)
            continue
        calls[entrant.name] = partial(entrant.call, given)
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
    """Make one of the seconds of each round, and those of its floor and of LLaVA's tower."""
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
    """Do what LLaVA's tower does with a list, one image after another, and what the bundle does."""
    llava = next(entrant for entrant in entrants if entrant.name == LLAVA)
    try:
        images = list(draw_images(arena, count))
        one_by_one = [llava.prepare(image[None]) for image in images]
        given = [image.to(arena.tower.dtype) for image in images]
        seconds = race(
            {LLAVA: lambda: [llava.call(image) for image in one_by_one], TRTOWER: lambda: arena.tower(given)},
            rounds=rounds,
        )
    except Exception as err:  # noqa: BLE001 - what was measured before is not lost for a list that does not fit
        absent[f"a list of {count}"] = _words(err)
        return None
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return ListTiming(images=count, rounds=rounds, llava_s=medians[LLAVA], trtower_s=medians[TRTOWER])


def _words(err: Exception) -> str:
    """Put an error into one line that is not too long for a table."""
    return one_line(err)[:300]


def draw_images(arena: Arena, batch: int) -> Tensor:
    """Draw (B, 3, S, S) on the device, in FP32."""
    side = arena.bundle.manifest.spec.image_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(SEED)).to(arena.device)


def _error(found: Tensor, reference: Tensor) -> float | None:
    error = float((found.float() - reference).norm() / reference.norm())
    return error if math.isfinite(error) else None
