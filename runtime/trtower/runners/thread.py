"""A thread that runs the calls of others, one after another."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from trtower.errors import BackendError
from trtower.runners.base import CLOSED

Work = tuple[Callable[[], None], "Future[None]"]


class Thread:
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
            except BaseException as err:  # noqa: BLE001 - the caller gets it
                done.set_exception(err)
            else:
                done.set_result(None)
            del call, done, work  # they hold tensors
