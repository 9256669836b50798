"""Tell of every engine call how long it waited and ran, to whoever asked to be told. Nothing of it runs unasked."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from trtower.runners.base import Run, Runner


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """One engine call: how many images, on which backend, and the seconds it waited for its turn.

    A batch beyond the profile is several calls, and each is reported.
    """

    batch: int
    backend: str
    queue_s: float
    _ran: Callable[[], float] = field(repr=False)

    @property
    def run_s(self) -> float:
        """The seconds the engine ran. On CUDA this waits until it has, so read it later than in the callback."""
        return self._ran()


OnBatch = Callable[[BatchReport], None]


def observed(runner: Runner, on_batch: OnBatch | None, *, nvtx: bool) -> Run:
    """Give `runner.run`, with ``on_batch`` told of every call, and an NVTX range around each."""

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
    """Times a call: by the clock, or on CUDA, where it is only queued when it returns, by two events in its streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._asked = time.perf_counter()

    def start(self, stream: Any) -> None:
        """Take note that the call has its turn."""
        self._started = time.perf_counter()
        self.queue_s = self._started - self._asked
        if self._events:
            self._events[0].record(stream)

    def stop(self) -> Callable[[], float]:
        """Take note that the call has returned; give what tells how long it ran."""
        if not self._events:
            seconds = time.perf_counter() - self._started
            return lambda: seconds
        begin, end = self._events
        end.record(torch.cuda.current_stream(self._device))

        def ran() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return ran
