"""Let threads share what one call at a time may use: a pool that lends it out, or a thread that all calls run in."""

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
    """Up to ``most`` things of one kind, of which a caller has one to itself; the others wait their turn.

    The first is made here, and its error is raised. If a further one cannot be made, for want of memory above all, the
    bound is what there is from then on, and the log says why.
    """

    def __init__(self, make: Callable[[], T], most: int) -> None:
        self._make, self._most = make, most
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
                logger.warning("no more callers at once than now: %s", err)

    def close(self) -> list[T]:
        """Wait until all are back, let go of them and give them. Who still waits for one gets a BackendError."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            self._change.wait_for(lambda: len(self._idle) == self._made)
            things, self._idle, self._made = self._idle, [], 0
        return things


class SerialThread:
    """Runs what it is given until `end`. An executor of Python's would end with the main thread, before others do."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._open = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], None]) -> None:
        """Have ``call`` run and wait for it; raise what it raises, and BackendError after `end`."""
        done: Future[None] = Future()
        with self._open:
            if self._ended:
                raise BackendError(CLOSED)
            self._work.put((call, done))
        done.result()

    def end(self) -> bool:
        """Let what was given end, and the thread with it; False where that was done before."""
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
            except BaseException as err:  # noqa: BLE001 - the caller gets it
                done.set_exception(err)
            del call, done, work  # they hold tensors
