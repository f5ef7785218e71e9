"""A TracerProvider that sends spans to one OpenTelemetry receiver, with OTLP over HTTP.

Imported only when it is needed: it takes the SDK, which takes a third of a second to import.
"""

import logging
import time
from collections.abc import Mapping, Sequence

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from asyncsplit.telemetry import tracing
from asyncsplit.telemetry.complaints import Complaints, overheard

logger = logging.getLogger(__name__)


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
        return self._exporter.complaints.failing

    def close(self) -> None:
        """Send what is left if the receiver was there the last time; blocks for a few seconds."""
        if self.failing:
            self._exporter.shutdown()
        self.shutdown()


class _Exporter(SpanExporter):
    def __init__(self, endpoint: str) -> None:
        self._exporter = trace_exporter.OTLPSpanExporter(endpoint, timeout=tracing.EXPORT_TIMEOUT_S)
        self._closed = False
        self.complaints = Complaints(
            f"Spans to {endpoint}", "They are lost; later ones are tried again."
        )

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._closed:
            return SpanExportResult.FAILURE
        with overheard(trace_exporter.__name__) as said:
            try:
                result = self._exporter.export(spans)
            except Exception as error:  # which some versions of it raise
                result = SpanExportResult.FAILURE
                said.append(str(error))
        now = time.monotonic()
        if result is SpanExportResult.SUCCESS:
            line = self.complaints.arrived(now)
        else:
            line = self.complaints.failed(now, said[0] if said else "no answer")
        if line is not None:
            # Good news, too: at another level it would be missing where the bad was seen.
            logger.warning("%s", line)
        return result

    def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True
