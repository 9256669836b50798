"""Metrics of towers for Prometheus. Nothing is registered until `BatchMetrics` is made.

On Triton and Ray, their own metrics say the same of requests; these are for a tower in a process of yours.
"""

from collections.abc import Iterator
from typing import Any

from trtower.extras import import_extra
from trtower.runners.observation import BatchReport, OnBatch
from trtower.serving.deferred import Deferred

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper ends of the histograms' buckets."""

LABELS = ("tower", "backend")


class BatchMetrics:
    """Counts engine calls: `tower.on_batch = BatchMetrics().of("clip")`. One object serves all towers of a process.

    | metric | labels |
    |---|---|
    | `trtower_images_total` | tower, backend |
    | `trtower_batch_size` (histogram) | tower, backend |
    | `trtower_queue_seconds`, `trtower_run_seconds` (histograms) | tower, backend |
    | `trtower_errors_total`, by the class of what the engine raised | tower, backend, kind |

    Args:
        registry: Where to register them. Default: prometheus_client's own registry.

    Raises:
        MissingExtraError: prometheus_client is not installed.
    """

    def __init__(self, registry: Any = None) -> None:
        client = import_extra("prometheus_client", extra="metrics", purpose="metrics for Prometheus")

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Any:
            return client.Histogram(f"trtower_{name}", about, LABELS, registry=None, buckets=buckets)

        self._images = client.Counter("trtower_images", "Images that engines encoded.", LABELS, registry=None)
        self._batch = histogram("batch_size", "Images in an engine call.", SIZES)
        self._queue = histogram("queue_seconds", "How long engine calls waited for their turn.", SECONDS)
        self._run = histogram("run_seconds", "How long the engine ran in a call.", SECONDS)
        self._errors = client.Counter("trtower_errors", "Engine calls that failed.", (*LABELS, "kind"), registry=None)
        self._reports: Deferred[str] = Deferred(self._count)
        (registry or client.REGISTRY).register(self)

    def of(self, tower: str) -> OnBatch:
        """Return what a tower's `on_batch` is set to; ``tower`` is the label that it gets."""
        return lambda report: self._reports.add(report, tower)

    def collect(self) -> Iterator[Any]:
        """Yield the metrics for a scrape, after the engine calls that have returned have ended."""
        self._reports.hand_on(wait=True)
        for metric in (self._images, self._batch, self._queue, self._run, self._errors):
            yield from metric.collect()

    def _count(self, report: BatchReport, tower: str) -> None:
        labels = (tower, report.backend)
        if report.error is not None:
            self._errors.labels(*labels, type(report.error).__name__).inc()
            return
        self._images.labels(*labels).inc(report.batch)
        self._batch.labels(*labels).observe(report.batch)
        self._queue.labels(*labels).observe(report.queue_s)
        self._run.labels(*labels).observe(report.run_s)
