"""Spans of engine calls for OpenTelemetry, by its API only: without an SDK in the application nothing happens."""

from typing import Any

from trtower.extras import import_extra
from trtower.runners.observation import BatchReport, OnBatch
from trtower.serving.deferred import Deferred


class BatchSpans:
    """Makes a span of each engine call, below the caller's own span: `tower.on_batch = BatchSpans().of("clip")`.

    A span is called "trtower.batch". It lasts from the call to the engine's end, and has the attributes
    `trtower.tower`, `.backend`, `.batch`, `.queue_s` and `.run_s`; one of a failed call has the exception, too.

    Args:
        tracer_provider: Where spans go. Default: the application's.

    Raises:
        MissingExtraError: opentelemetry-api is not installed.
    """

    def __init__(self, tracer_provider: Any = None) -> None:
        self._trace = import_extra("opentelemetry.trace", extra="tracing", purpose="spans for OpenTelemetry")
        self._tracer = self._trace.get_tracer("trtower", tracer_provider=tracer_provider)
        self._reports: Deferred[Any] = Deferred(self._end)

    def of(self, tower: str) -> OnBatch:
        """Return what a tower's `on_batch` is set to; ``tower`` is the name that its spans have."""

        def begin(report: BatchReport) -> None:
            attributes = {
                "trtower.tower": tower,
                "trtower.backend": report.backend,
                "trtower.batch": report.batch,
                "trtower.queue_s": report.queue_s,
            }
            span = self._tracer.start_span("trtower.batch", start_time=_ns(report.called_at), attributes=attributes)
            self._reports.add(report, span)

        return begin

    def flush(self) -> None:
        """Wait for the engine calls that have returned, and end their spans; call it before the provider's shutdown."""
        self._reports.hand_on(wait=True)

    def _end(self, report: BatchReport, span: Any) -> None:
        span.set_attribute("trtower.run_s", report.run_s)
        if report.error is not None:
            span.record_exception(report.error)
            span.set_status(self._trace.StatusCode.ERROR, str(report.error))
        span.end(_ns(report.called_at + report.queue_s + report.run_s))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
