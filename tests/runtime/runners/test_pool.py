"""The pool lends a thing to one call at a time, and never makes more than its limit."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trtower.errors import BackendError
from trtower.runners.pool import Pool

PATIENCE_S = 10


def test_first_is_made_at_once_and_the_rest_on_demand() -> None:
    made: list[int] = []
    pool = Pool(lambda: made.append(len(made)) or made[-1], 3)
    assert made == [0]
    with pool.lend() as first:
        assert first == 0
        assert made == [0]
        with pool.lend() as second:
            assert second == 1
    with pool.lend(), pool.lend():
        assert made == [0, 1]


def test_no_two_calls_hold_the_same_one_and_the_limit_is_kept() -> None:
    made: list[object] = []
    held: set[int] = set()

    def make() -> object:
        made.append(object())
        return made[-1]

    pool = Pool(make, 3)

    def use(_: int) -> None:
        with pool.lend() as thing:
            assert id(thing) not in held
            held.add(id(thing))
            time.sleep(1e-4)
            held.remove(id(thing))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(use, range(500)))
    assert 1 <= len(made) <= 3


def test_pool_that_cannot_grow_continues_with_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    made = iter([1])

    def make() -> int:
        for thing in made:
            return thing
        raise BackendError("no memory")

    pool = Pool(make, 4)
    with ThreadPoolExecutor(1) as thread:
        with pool.lend():
            waiting = thread.submit(borrow, pool)
            time.sleep(0.05)
            assert not waiting.done()
        assert waiting.result(PATIENCE_S) == 1
    with pool.lend():
        assert caplog.messages == ["concurrency stays at its current level: no memory"]


def test_failure_to_make_the_first_is_an_error() -> None:
    def make() -> int:
        raise BackendError("no memory")

    with pytest.raises(BackendError, match="no memory"):
        Pool(make, 4)


def borrow(pool: Pool[int]) -> int:
    with pool.lend() as thing:
        return thing


def test_close_waits_for_borrowers_and_refuses_later_ones() -> None:
    pool = Pool(int, 1)
    with ThreadPoolExecutor(2) as threads:
        with pool.lend():
            closing = threads.submit(pool.close)
            waiting = threads.submit(borrow, pool)
            time.sleep(0.05)
            assert not closing.done()
        closing.result(PATIENCE_S)
        with pytest.raises(BackendError, match="closed"):
            waiting.result(PATIENCE_S)
    with pytest.raises(BackendError, match="closed"), pool.lend():
        pass


@pytest.mark.parametrize("error", [BackendError("no room"), MemoryError("std::bad_alloc")])
def test_pool_can_be_closed_while_it_fails_to_make_one_more(error: Exception) -> None:
    trying, go_on = threading.Event(), threading.Event()

    def make() -> object:
        if not made:
            made.append(object())
            return made[0]
        trying.set()
        go_on.wait(PATIENCE_S)
        raise error

    made: list[object] = []
    pool = Pool(make, 2)
    with ThreadPoolExecutor(2) as threads:
        with pool.lend():
            waiting = threads.submit(lambda: pool.lend().__enter__())
            assert trying.wait(PATIENCE_S)
        closing = threads.submit(pool.close)
        go_on.set()
        assert closing.result(PATIENCE_S) == made
        assert isinstance(waiting.exception(PATIENCE_S), type(error))


def test_error_other_than_lack_of_room_keeps_the_limit() -> None:
    errors = [MemoryError("once")]
    made: list[object] = []

    def make() -> object:
        if made and errors:
            raise errors.pop()
        made.append(object())
        return made[-1]

    pool = Pool(make, 2)
    with pool.lend():
        with pytest.raises(MemoryError), pool.lend():
            pass
        with pool.lend():
            assert len(made) == 2
