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
        called_at: When the call was made, in seconds since 1970.
        queue_s: Seconds that the call waited for its turn.
        error: What the engine raised, or None. The tower's call raises it, too, after the callback.
    """

    batch: int
    backend: str
    called_at: float
    queue_s: float
    error: Exception | None
    _ran: Callable[[], float] = field(repr=False)
    _is_done: Callable[[], bool] = field(repr=False)

    @property
    def run_s(self) -> float:
        """Seconds that the engine ran. On CUDA, reading it waits for the engine, so read it after the callback."""
        return self._ran()

    @property
    def is_done(self) -> bool:
        """Whether the engine has ended, so that `run_s` is known without waiting."""
        return self._is_done()


OnBatch = Callable[[BatchReport], None]


def observed(runner: Runner, on_batch: OnBatch | None, *, nvtx: bool) -> Run:
    """Wrap `runner.run`: report each call to ``on_batch``, and with ``nvtx`` put an NVTX range around it."""

    def run(pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
        batch = len(pixel_values)
        watch = _Watch(runner.device)
        try:
            with torch.cuda.nvtx.range(f"trtower {runner.backend} batch {batch}") if nvtx else nullcontext():
                runner.run(pixel_values, hidden_states, watch.start)
                watch.stop()
        except Exception as err:
            watch.fail()
            if on_batch is not None:
                on_batch(watch.report(batch, runner.backend, err))
            raise
        if on_batch is not None:
            on_batch(watch.report(batch, runner.backend, None))

    return run


class _Watch:
    """Times one call: on the CPU by the clock; on CUDA, where a call only queues its work, by two events in streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._called_at, self._called = time.time(), time.perf_counter()
        self._started: float | None = None

    def start(self, stream: Any) -> None:
        """Record that the call's turn has come."""
        self._started = time.perf_counter()
        if self._events:
            self._events[0].record(stream)

    def stop(self) -> None:
        """Record that the call has returned."""
        self._stopped = time.perf_counter()
        if self._events:
            self._events[1].record(torch.cuda.current_stream(self._device))

    def fail(self) -> None:
        """Record that the call has failed, perhaps before its turn: from here on, only the clock counts."""
        self._stopped = time.perf_counter()
        self._events = []

    def report(self, batch: int, backend: str, error: Exception | None) -> BatchReport:
        """Make the report of a call that has returned or failed."""
        started, events = self._started or self._stopped, self._events
        seconds = self._stopped - started

        def ran() -> float:
            if not events:
                return seconds
            begin, end = events
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return BatchReport(
            batch=batch,
            backend=backend,
            called_at=self._called_at,
            queue_s=started - self._called,
            error=error,
            _ran=ran,
            _is_done=lambda: not events or bool(events[1].query()),
        )
