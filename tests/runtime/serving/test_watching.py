"""Metrics and spans say what engine calls did, also of calls that fail, and wait for no GPU."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from tests.conftest import CHOSEN_ON_A_CPU, IMAGE_SIZE
from trtower import BatchReport, MissingExtraError, VisionTower
from trtower.serving.deferred import Deferred
from trtower.serving.metrics import BatchMetrics
from trtower.serving.tracing import BatchSpans


@pytest.fixture
def tower(fp32_bundle: Path) -> Iterator[VisionTower]:
    with VisionTower.load(fp32_bundle, CHOSEN_ON_A_CPU) as tower:
        yield tower


def draw(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


class BrokenEngineError(RuntimeError):
    pass


@pytest.fixture
def break_engine(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def fail(*_: Any) -> None:
        raise BrokenEngineError("it is broken")

    return lambda: monkeypatch.setattr(tower.runner, "run", fail)


# Reports


def test_failed_call_is_reported_and_raised(tower: VisionTower, break_engine: Callable[[], None]) -> None:
    reports: list[BatchReport] = []
    tower.on_batch = reports.append
    before = time.time()
    tower(draw(2))
    break_engine()
    with pytest.raises(BrokenEngineError):
        tower(draw(1))
    assert [(report.batch, type(report.error)) for report in reports] == [(2, type(None)), (1, BrokenEngineError)]
    assert all(report.is_done and report.run_s >= 0 and report.queue_s >= 0 for report in reports)
    assert before <= reports[0].called_at <= reports[1].called_at <= time.time()


def test_reports_are_handed_on_in_order_when_the_engine_has_ended() -> None:
    ended, handed = set[int](), list[str]()
    deferred: Deferred[str] = Deferred(lambda report, about: handed.append(f"{about} {report.run_s}"))

    def report(number: int) -> BatchReport:
        times: dict[str, Any] = {"called_at": 0.0, "queue_s": 0.0, "error": None}
        return BatchReport(batch=1, backend="b", _ran=lambda: float(number), _is_done=lambda: number in ended, **times)

    deferred.add(report(0), "first")
    deferred.add(report(1), "second")
    assert handed == []
    ended.add(1)
    deferred.add(report(2), "third")
    assert handed == []
    ended.add(0)
    deferred.hand_on(wait=False)
    assert handed == ["first 0.0", "second 1.0"]
    deferred.hand_on(wait=True)
    assert handed[2:] == ["third 2.0"]


def test_call_does_not_wait_for_a_scrape_that_waits_for_a_gpu() -> None:
    handed, may_end = list[int](), threading.Event()

    def then(report: BatchReport, number: int) -> None:
        handed.append(number)
        assert may_end.wait(10)

    deferred: Deferred[int] = Deferred(then)
    times: dict[str, Any] = {"called_at": 0.0, "queue_s": 0.0, "error": None, "batch": 1, "backend": "b"}
    report = BatchReport(**times, _ran=lambda: 0.0, _is_done=lambda: False)
    deferred.add(report, 0)
    scrape = threading.Thread(target=lambda: deferred.hand_on(wait=True))
    scrape.start()
    while not handed:
        time.sleep(0.01)
    deferred.add(report, 1)  # returns at once
    may_end.set()
    scrape.join()
    deferred.hand_on(wait=True)
    assert handed == [0, 1]


# Prometheus


def test_metrics_count_images_calls_and_errors(tower: VisionTower, break_engine: Callable[[], None]) -> None:
    registry = CollectorRegistry()
    tower.on_batch = BatchMetrics(registry).of("clip")
    tower(draw(6))  # 4 and 2
    tower(draw(1))
    break_engine()
    with pytest.raises(BrokenEngineError):
        tower(draw(1))
    labels = {"tower": "clip", "backend": CHOSEN_ON_A_CPU}

    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(name, labels | more)

    assert value("trtower_images_total") == 7
    assert value("trtower_batch_size_count") == value("trtower_run_seconds_count") == 3
    assert value("trtower_batch_size_sum") == 7
    assert value("trtower_batch_size_bucket", le="2.0") == 2
    run_seconds = value("trtower_run_seconds_sum")
    assert run_seconds is not None
    assert run_seconds > 0
    assert value("trtower_queue_seconds_count") == 3
    assert value("trtower_errors_total", kind="BrokenEngineError") == 1
    assert b"trtower_images_total" in generate_latest(registry)


def test_one_object_serves_several_towers(tower: VisionTower) -> None:
    registry = CollectorRegistry()
    metrics = BatchMetrics(registry)
    for name in ("a", "b"):
        tower.on_batch = metrics.of(name)
        tower(draw(1))
    for name in ("a", "b"):
        assert registry.get_sample_value("trtower_images_total", {"tower": name, "backend": CHOSEN_ON_A_CPU}) == 1


# OpenTelemetry


def test_spans_lie_below_the_callers_and_last_as_the_call(tower: VisionTower, break_engine: Callable[[], None]) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = BatchSpans(provider)
    tower.on_batch = spans.of("clip")
    with provider.get_tracer("application").start_as_current_span("request"):
        tower(draw(3))
    break_engine()
    with pytest.raises(BrokenEngineError):
        tower(draw(1))
    spans.flush()
    done, request, failed = exporter.get_finished_spans()
    assert (done.name, request.name, failed.name) == ("trtower.batch", "request", "trtower.batch")
    assert done.parent is not None
    assert request.context is not None
    assert done.parent.span_id == request.context.span_id
    assert done.attributes is not None
    assert done.attributes["trtower.tower"] == "clip"
    assert done.attributes["trtower.batch"] == 3
    assert done.attributes["trtower.backend"] == CHOSEN_ON_A_CPU
    assert done.start_time is not None
    assert done.end_time is not None
    seconds = float(str(done.attributes["trtower.run_s"])) + float(str(done.attributes["trtower.queue_s"]))
    assert (done.end_time - done.start_time) / 1e9 == pytest.approx(seconds, abs=1e-4)
    assert done.status.is_unset
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert [event.name for event in failed.events] == ["exception"]


def test_without_an_sdk_nothing_happens(tower: VisionTower) -> None:
    tower.on_batch = BatchSpans().of("clip")
    assert tower(draw(1)).shape[0] == 1


# Extras


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [(BatchMetrics, "prometheus_client", "metrics"), (BatchSpans, "opentelemetry", "tracing")],
)
def test_missing_package_is_named(
    make: Callable[[], Any], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs the package {package}, .*\[{extra}\]"):
        make()
