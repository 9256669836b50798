"""Share between threads what only one call at a time may use: lend it from a pool, or run every call in one thread."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from trtower.errors import BackendError
from trtower.runners.base import CLOSED

T = TypeVar("T")

Work = tuple[Callable[[], None], "Future[None]"]

logger = logging.getLogger(__name__)


class Pool(Generic[T]):
    """Up to ``limit`` things of one kind, each lent to one caller at a time; further callers wait for their turn.

    The first is made here, and an error in making it is raised. If a later one raises BackendError, mostly for lack of
    memory, the limit drops to the current size, and a warning says why.
    """

    def __init__(self, make: Callable[[], T], limit: int) -> None:
        self._make, self._limit = make, limit
        self._idle: list[T] = [make()]
        self._size = 1
        self._closed = False
        self._change = threading.Condition()

    @contextmanager
    def lend(self, prefer: Callable[[T], bool] | None = None) -> Iterator[T]:
        """Lend one for the length of the block; raise BackendError if the pool is closed.

        By default lend the one that was used last, because its memory is warm. With ``prefer``, lend one that it
        accepts. If it accepts none, make a new one within the limit; at the limit, lend the one idle for longest.
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
                self._change.wait_for(lambda: self._idle or self._size < self._limit or self._closed)
                if self._closed:
                    raise BackendError(CLOSED)
                fitting = [thing for thing in self._idle if prefer is None or prefer(thing)]
                if fitting or self._size == self._limit:
                    thing = fitting[-1] if fitting else self._idle[0]
                    self._idle.remove(thing)
                    return thing
                self._size += 1
            try:
                return self._make()
            except BaseException as err:
                with self._change:
                    self._size -= 1
                    if isinstance(err, BackendError):
                        self._limit = self._size
                    self._change.notify_all()
                if not isinstance(err, BackendError):
                    raise
                logger.warning("concurrency stays at its current level: %s", err)

    def close(self) -> list[T]:
        """Wait until all are back, then empty the pool and return them; callers still waiting get a BackendError."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            self._change.wait_for(lambda: len(self._idle) == self._size)
            things, self._idle, self._size = self._idle, [], 0
        return things


class SerialThread:
    """Runs calls one after another in its own thread, until `end`.

    Python's own executors stop with the main thread, when other threads may still have calls to run.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._open = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], None]) -> None:
        """Run ``call`` and wait for it. Raise what it raises; raise BackendError after `end`."""
        done: Future[None] = Future()
        with self._open:
            if self._ended:
                raise BackendError(CLOSED)
            self._work.put((call, done))
        done.result()

    def end(self) -> bool:
        """Finish the calls that were submitted, then stop the thread; return False if it was stopped before."""
        with self._open:
            if self._ended:
                return False
            self._ended = True
            self._work.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()
        return True

    def _serve(self) -> None:
        while work := self._work.get():
            call, done = work
            try:
                call()
                done.set_result(None)
            except BaseException as err:  # noqa: BLE001 - raised in the caller
                done.set_exception(err)
            del call, done, work  # they would keep tensors alive
