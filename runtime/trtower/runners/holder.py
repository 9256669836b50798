"""Keep the runner of a tower open for as long as a call needs it, and in the process that opened it."""

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from trtower.errors import BackendError
from trtower.runners.base import Runner

_opened: "weakref.WeakSet[Runner]" = weakref.WeakSet()
_opened_in: set[int] = set()
"""Processes in which a runner was opened: this one, and those that it is a fork of."""


def refuse_fork() -> None:
    """Raise BackendError in a fork of a process that has opened a runner: its calls would hang, torch's own too."""
    if others := _opened_in - {os.getpid()}:
        raise BackendError(
            f"process {max(others)} has had a tower loaded before it forked this one, and neither torch's threads nor "
            "a backend's live on here: start processes with 'spawn', or load towers after the fork alone."
        )


def _never_let_go() -> None:
    """Keep what a fork has inherited: to free it would wait for threads that are in the other process."""
    for runner in _opened:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runner))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_never_let_go)


class Holder:
    """Holds one runner, or none. Calls borrow it, and it is closed when none has it any more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.runner: Runner | None = None
        self._process = os.getpid()
        self._calls: list[tuple[Runner, int]] = []
        self._change = threading.Condition()

    @contextmanager
    def lend(self) -> Iterator[Runner]:
        """Lend the runner for one call of a tower; raise BackendError where there is none that can run."""
        if self._forked():
            raise BackendError(
                f"{self.name} was loaded in process {self._process}, and this is a fork of it, where no backend runs: "
                "start processes with 'spawn', and load it in each."
            )
        with self._change:
            runner = self.runner
            if runner is None:
                raise BackendError(f"{self.name}: this tower is not loaded, or closed: call load_model().")
            if torch._C._is_tracing():  # torch.jit.is_tracing, which has no types
                raise BackendError(
                    f"{self.name} cannot be traced by torch.jit: the trace would have an empty tensor in the place of "
                    "the engine. Trace what comes before and after it."
                )
            if _is_captured(runner.device):
                raise BackendError(
                    f"{self.name} cannot run while a CUDA graph is captured around it, for its calls share memory that "
                    "the graph knows nothing of: capture what comes before and after it."
                )
            call = (runner, threading.get_ident())
            self._calls.append(call)
        try:
            yield runner
        finally:
            with self._change:
                self._calls.remove(call)
                self._change.notify_all()

    def refuse_own_call(self) -> None:
        """Raise BackendError inside a call of the runner that is held, which would wait for itself to end."""
        with self._change:
            if any(thread == threading.get_ident() for _, thread in self._calls):
                raise BackendError(f"{self.name} is not closed or moved inside a call of its own: do so after it.")

    def swap(self, runner: Runner | None) -> Callable[[], None]:
        """Hold another runner, or none, which later calls get; give what closes the one before.

        That waits until no call has it: call it with no lock held that a call may want.
        """
        with self._change:
            before, self.runner = self.runner, runner
            if runner is not None:
                self._process = os.getpid()  # which may be a fork of the one that made this holder, with no runner yet
                _opened.add(runner)
                _opened_in.add(self._process)

        def close() -> None:
            with self._change:
                self._change.wait_for(lambda: all(each is not before for each, _ in self._calls))
            if before is not None:
                before.close()

        return close

    def close(self) -> None:
        """Hold none. A fork lets go of nothing. Raises BackendError inside a call of its own."""
        if not self._forked():
            self.refuse_own_call()
            self.swap(None)()

    def _forked(self) -> bool:
        return os.getpid() != self._process


def _is_captured(device: torch.device) -> bool:
    """Whether the current stream of a GPU is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
