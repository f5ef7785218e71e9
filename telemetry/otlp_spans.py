"""A TracerProvider that sends spans to one OpenTelemetry receiver, with OTLP over HTTP.

Imported only when it is needed: it takes the SDK, which takes a third of a second to import.
"""

import contextvars
import logging
from collections.abc import Mapping, Sequence

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from asyncsplit.telemetry import tracing

logger = logging.getLogger(__name__)

_quiet = contextvars.ContextVar("_quiet", default=False)
"""Whether an export is tried again after one that failed and was logged."""

# The exporter logs every attempt, for days if a job runs that long without its receiver.
logging.getLogger(trace_exporter.__name__).addFilter(lambda record: not _quiet.get())


class PushingProvider(TracerProvider):
    """Sends every few seconds, from a thread of its own; no failure of that gets out."""

    def __init__(self, endpoint: str, resource: Mapping[str, str]) -> None:
        """Prepare to send; nothing is sent before a span ends."""
        super().__init__(resource=Resource.create({**resource}), shutdown_on_exit=False)
        self._exporter = _Exporter(endpoint)
        self.add_span_processor(BatchSpanProcessor(self._exporter))

    @property
    def failing(self) -> bool:
        """Whether what was sent last has not arrived."""
        return self._exporter.failing

    def close(self) -> None:
        """Send what is left if the receiver was there the last time; blocks for a few seconds."""
        if self.failing:
            self._exporter.shutdown()
        self.shutdown()


class _Exporter(SpanExporter):
    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._exporter = trace_exporter.OTLPSpanExporter(endpoint, timeout=tracing.EXPORT_TIMEOUT_S)
        self._closed = False
        self.failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._closed:
            return SpanExportResult.FAILURE
        token = _quiet.set(self.failing)
        try:
            result = self._exporter.export(spans)
        except Exception:  # which some versions of it raise
            result = SpanExportResult.FAILURE
        finally:
            _quiet.reset(token)
        if result is not SpanExportResult.SUCCESS and not self.failing:
            logger.warning(
                "Spans cannot be sent to %s, and are lost. Later ones are tried again, without"
                " another warning; everything else works.",
                self._endpoint,
            )
        self.failing = result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True
