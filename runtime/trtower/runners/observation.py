"""Report queue and run time of each engine call to an optional callback. None of this runs unless requested."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from trtower.runners.base import Run, Runner


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """How long one engine call waited and ran. A batch beyond the profile takes several calls, with a report each.

    Attributes:
        batch: How many images the call had.
        backend: The backend that ran it, such as "tensorrt-rtx".
        queue_s: Seconds that the call waited for its turn.
    """

    batch: int
    backend: str
    queue_s: float
    _ran: Callable[[], float] = field(repr=False)

    @property
    def run_s(self) -> float:
        """Seconds that the engine ran. On CUDA, reading it waits for the engine, so read it after the callback."""
        return self._ran()


OnBatch = Callable[[BatchReport], None]


def observed(runner: Runner, on_batch: OnBatch | None, *, nvtx: bool) -> Run:
    """Wrap `runner.run`: report each call to ``on_batch``, and with ``nvtx`` put an NVTX range around it."""

    def run(pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
        name = f"trtower {runner.backend} batch {len(pixel_values)}"
        with torch.cuda.nvtx.range(name) if nvtx else nullcontext():
            watch = _Watch(runner.device)
            runner.run(pixel_values, hidden_states, watch.start)
            ran = watch.stop()
        if on_batch is not None:
            on_batch(BatchReport(batch=len(pixel_values), backend=runner.backend, queue_s=watch.queue_s, _ran=ran))

    return run


class _Watch:
    """Times one call: on the CPU by the clock; on CUDA, where a call only queues its work, by two events in streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._called = time.perf_counter()

    def start(self, stream: Any) -> None:
        """Record that the call's turn has come."""
        self._started = time.perf_counter()
        self.queue_s = self._started - self._called
        if self._events:
            self._events[0].record(stream)

    def stop(self) -> Callable[[], float]:
        """Record that the call has returned; return a function that returns the seconds it ran."""
        if not self._events:
            seconds = time.perf_counter() - self._started
            return lambda: seconds
        begin, end = self._events
        end.record(torch.cuda.current_stream(self._device))

        def ran() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return ran
