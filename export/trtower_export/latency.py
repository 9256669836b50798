"""Time towers against each other, in turn in one run, so that a machine whose speed drifts drifts for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 5


def race(competitors: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS) -> dict[str, float]:
    """Give the median seconds of each competitor over ``rounds``, after one call each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds + 1):
        for name, call in competitors.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
