"""Time towers in turn in one run, so that a drift in the machine's speed affects all of them alike."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trtower.bundle.manifest import Manifest
from trtower.spec import profile_batches

ROUNDS = 5
SEED = 0

UNEVEN = 1.5
"""When a call takes more than this many times its median, something else was running on the machine."""

REST_S = 0.02
"""Pause between two competitors: the threads of one keep spinning for a while on the cores of the next."""


def race(
    competitors: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    drop: Callable[[str, Exception], None] | None = None,
    on_gpu: bool | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each competitor in each of ``rounds``, after one uncounted call each.

    CUDA events on the current GPU measure the calls if ``on_gpu``, else the clock does; None means whether this machine
    has a GPU. With ``drop``, a competitor that
    raises leaves the race, and ``drop`` is called with its name and the error; otherwise the error is raised.
    """
    clock = _on_gpu if (torch.cuda.is_available() if on_gpu is None else on_gpu) else _on_cpu
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds + 1):
        for name in [*seconds]:
            time.sleep(REST_S)
            try:
                elapsed = clock(competitors[name])
            except Exception as err:
                if drop is None:
                    raise
                drop(name, err)
                del seconds[name]
                continue
            if turn:
                seconds[name].append(elapsed)
    return seconds


def _on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_gpu(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def batches_to_time(manifest: Manifest, kind: str) -> list[int]:
    """List the batches to time if nobody names any: on CUDA those of the profiles, elsewhere the smallest."""
    return profile_batches(manifest.profiles) if kind == "cuda" else [manifest.batch.min]


def draw_inputs(manifest: Manifest, batch: int) -> Tensor:
    """Draw random images in the shape that the engine takes: numbers in FP32, or bytes."""
    shape = (batch, *manifest.input.row)
    generator = torch.Generator().manual_seed(SEED)
    if manifest.spec.takes_floats:
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
