"""Lend out what one call at a time may use: made when all there are are in use, up to a bound."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from trtower.errors import BackendError
from trtower.runners.base import CLOSED

T = TypeVar("T")

logger = logging.getLogger(__name__)


def log(err: BackendError) -> None:
    """Say that a pool stays smaller than it might be."""
    logger.warning("no more callers at once than now: %s", err)


class Pool(Generic[T]):
    """Up to ``most`` things of one kind, of which a caller has one to itself; the others wait their turn.

    The first is made here, and its error is raised. Where a further one cannot be made, for want of memory above all,
    the bound is what there is from then on, and ``complain`` is told why.
    """

    def __init__(self, make: Callable[[], T], most: int, complain: Callable[[BackendError], None] = log) -> None:
        self._make, self._most, self._complain = make, most, complain
        self._idle: list[T] = [make()]
        self._made = 1
        self._closed = False
        self._change = threading.Condition()

    @contextmanager
    def lend(self, prefer: Callable[[T], bool] | None = None) -> Iterator[T]:
        """Lend one for the length of the block.

        By default the one that was used last, for its memory is warm. With ``prefer`` one that it is true of; without
        such a new one, within the bound; else the one that has been idle for longest.
        """
        thing = self._take(prefer)
        try:
            yield thing
        finally:
            with self._change:
                self._idle.append(thing)
                self._change.notify_all()

    def _take(self, prefer: Callable[[T], bool] | None) -> T:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._idle or self._made < self._most or self._closed)
                if self._closed:
                    raise BackendError(CLOSED)
                fitting = [thing for thing in self._idle if prefer is None or prefer(thing)]
                if fitting or self._made == self._most:
                    thing = fitting[-1] if fitting else self._idle[0]
                    self._idle.remove(thing)
                    return thing
                self._made += 1
            try:
                return self._make()
            except BaseException as err:
                with self._change:
                    self._made -= 1
                    if isinstance(err, BackendError):
                        self._most = self._made
                    self._change.notify_all()
                if not isinstance(err, BackendError):
                    raise
                self._complain(err)

    def close(self) -> list[T]:
        """Wait until all are back, let go of them and give them. Who still waits for one gets a BackendError."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            self._change.wait_for(lambda: len(self._idle) == self._made)
            things, self._idle, self._made = self._idle, [], 0
        return things
