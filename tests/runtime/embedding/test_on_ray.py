"""A connection to Ray is closed when nothing uses it any more: a call after that ends the process, with no word."""

import logging
import threading
import time
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

from trtower.embedding import on_ray


class RayStandIn:
    """Ray as far as it is connected to. Its thread runs a function as if Ray Data had it in one of its modules."""

    def __init__(self, runs: Any) -> None:
        there = {"__name__": "ray.data._internal.stand_in", "time": time}
        inside = FunctionType(runs.__code__, there, closure=runs.__closure__)
        self.thread = threading.Thread(target=inside, daemon=True)
        self.data = SimpleNamespace(DataContext=SimpleNamespace(get_current=SimpleNamespace))
        self.is_connected = False

    def is_initialized(self) -> bool:
        return self.is_connected

    def init(self, **_: object) -> None:
        self.is_connected = True

    def shutdown(self) -> None:
        self.is_connected = False


def test_shutdown_waits_for_the_threads_of_ray_data() -> None:
    connected: list[bool] = []

    def fetch() -> None:
        time.sleep(0.3)
        connected.append(ray.is_connected)

    ray = RayStandIn(fetch)
    with on_ray._connected(ray, on_ray.LOCAL):
        ray.thread.start()
    assert connected == [True]
    assert not ray.is_connected


def test_thread_that_waits_for_another_is_not_waited_for() -> None:
    event = threading.Event()
    ray = RayStandIn(lambda: event.wait())
    with on_ray._connected(ray, on_ray.LOCAL):
        ray.thread.start()
    assert not ray.is_connected
    event.set()


def test_process_stays_connected_if_ray_data_does_not_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(on_ray, "STOPS_WITHIN_S", 0.05)
    ray = RayStandIn(lambda: time.sleep(1))
    with caplog.at_level(logging.WARNING), on_ray._connected(ray, on_ray.LOCAL):
        ray.thread.start()
    assert ray.is_connected
    assert "Ray Data did not stop within 0 s: this process stays connected to Ray." in caplog.text
