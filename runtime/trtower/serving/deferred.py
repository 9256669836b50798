"""Hand reports of engine calls on when the engine has ended, without making a GPU's caller wait for it."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from trtower.runners.observation import BatchReport

T = TypeVar("T")


class Deferred(Generic[T]):
    """Reports in the order of the calls, each with something of its own, until their run time is known."""

    def __init__(self, then: Callable[[BatchReport, T], None]) -> None:
        self._then = then
        self._waiting: deque[tuple[BatchReport, T]] = deque()
        self._handing_on = threading.Lock()

    def add(self, report: BatchReport, about: T) -> None:
        """Add a report, and hand on all that are known."""
        self._waiting.append((report, about))
        self.hand_on(wait=False)

    def hand_on(self, *, wait: bool) -> None:
        """Hand on what is known, or ``wait`` until all is. Without it, return if another thread does so now."""
        if not self._handing_on.acquire(blocking=wait):
            return
        try:
            while self._waiting and (wait or self._waiting[0][0].is_done):
                self._then(*self._waiting.popleft())
        finally:
            self._handing_on.release()
