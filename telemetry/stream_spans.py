"""The spans that a consumer records: of its streams, and of the calls it makes."""

import time
from bisect import bisect_left
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager

from opentelemetry.trace import Span, SpanKind

from asyncsplit.telemetry import spans
from asyncsplit.telemetry.catalog import WAIT_BOUNDS
from asyncsplit.telemetry.counters import Exemplar, StreamTimes
from asyncsplit.telemetry.tracing import (
    Attributes,
    Carrier,
    Tracer,
    Tracing,
    ago,
    carrier_of,
    context_of,
    current,
    finish,
    harmless,
)

WAITS = 32
"""Waits of a stream that get a span before only longer ones do."""


class StreamSpans:
    """Records one stream. It has a span from the moment its epoch is known, and recorded."""

    def __init__(
        self, tracing: Tracing, opened: "Future[Tracer | None]", split: int, times: StreamTimes
    ) -> None:
        """Note in which span the loop runs."""
        self.opened = opened
        """Done when spans can be recorded."""
        self._parent = tracing.parent
        self._split = split
        self._times = times
        self._since_ns = time.time_ns()
        self._loop = current()
        self._tracer: Tracer | None = None
        self._span: Span | None = None
        self._epoch = -1
        self._carrier: Carrier | None = None
        self._longest = spans.Longest(WAITS)
        self._before = times.causes
        self._error: BaseException | None = None
        self._rejoining_ns = 0

    @property
    def carrier(self) -> Carrier | None:
        """The stream's span, for its pulls; None if it is not recorded."""
        return self._carrier

    @property
    def arrives_in(self) -> Carrier | None:
        """The span that the epoch is to be a part of."""
        return self._parent or self._carrier or self._loop

    @harmless
    def started(self, epoch: int, trace: Carrier | None) -> None:
        """Begin the stream's span in its epoch's trace, or go on with it after a restart."""
        if self._span is not None:
            self._rejoined()
            return
        self._tracer = self.opened.result(0)
        if trace is None or self._tracer is None:
            return
        inside = self._loop is not None and _trace_id(self._loop) == _trace_id(trace)
        parent, other = (self._loop, trace) if inside else (trace, self._loop)
        self._epoch = epoch
        attributes: Attributes = {spans.SPLIT: self._split, spans.EPOCH: epoch}
        self._span = self._tracer.start(
            spans.STREAM_SPAN, parent, attributes, since_ns=self._since_ns, links=[other]
        )
        self._carrier = None if self._span is None else carrier_of(self._span)

    def waits(self) -> None:
        """Note that the loop waits, from now on."""
        self._before = self._times.causes

    @harmless
    def got(self, seconds: float) -> None:
        """Note that a wait is over, and record it if it was long."""
        if self._span is None:
            return
        context = self._span.get_span_context()
        if self._longest.picks(seconds) and (span := self._record_wait(seconds)) is not None:
            context = span.get_span_context()
        bucket = bisect_left(WAIT_BOUNDS, seconds)
        self._times.exemplars[bucket] = Exemplar(
            bucket, f"{context.trace_id:032x}", f"{context.span_id:016x}", seconds, time.time()
        )

    def failed(self, error: BaseException) -> None:
        """Note what the loop is told instead of a batch."""
        self._error = error

    def rejoins(self) -> None:
        """Note the news that the coordinator was restarted."""
        self._rejoining_ns = time.time_ns()

    @harmless
    def ended(self, *, completed: bool, rows: int, batches: int) -> None:
        """End the stream's span."""
        if self._span is None:
            return
        outcome = "completed" if completed else "left"
        span, self._span = self._span, None
        attributes: Attributes = {
            spans.OUTCOME: outcome if self._error is None else "failed",
            spans.ROWS: rows,
            spans.BATCHES: batches,
            spans.WAIT: self._times.wait_s,
        }
        error, self._error = self._error, None
        finish(span, error, attributes=attributes)

    def flush(self) -> "Future[None] | None":
        """Send what was recorded; None if that was nothing, or cannot be sent."""
        if self._tracer is None or self._carrier is None:
            return None
        return self._tracer.flush()

    def _record_wait(self, seconds: float) -> Span | None:
        assert self._tracer is not None
        assert self._carrier is not None
        caused = {cause: after - self._before[cause] for cause, after in self._times.causes.items()}
        caused["conversion"] = seconds - sum(caused.values())
        attributes: Attributes = {
            spans.SPLIT: self._split,
            spans.EPOCH: self._epoch,
            spans.CAUSE: max(caused, key=lambda cause: caused[cause]),
        }
        return self._tracer.record(spans.WAIT_SPAN, self._carrier, attributes, ago(seconds))

    def _rejoined(self) -> None:
        if self._tracer is None or self._carrier is None or not self._rejoining_ns:
            return
        attributes: Attributes = {
            spans.SPLIT: self._split,
            spans.EPOCH: self._epoch,
            spans.REASON: "coordinator_restarted",
        }
        self._tracer.record(spans.REJOIN_SPAN, self._carrier, attributes, self._rejoining_ns)
        self._rejoining_ns = 0


@asynccontextmanager
async def schema_span(
    tracer: Tracer | None, during_execution: str
) -> AsyncIterator[Carrier | None]:
    """Record a call of ``schema()``; yield its span for the call, None if it is not recorded."""
    span = None if tracer is None else _calling(tracer, during_execution)
    try:
        yield None if span is None else harmless(carrier_of)(span)
    except Exception as error:
        if span is not None:
            harmless(finish)(span, error)
        raise
    except BaseException:  # cancelled, which is no error
        if span is not None:
            harmless(finish)(span)
        raise
    if span is not None:
        harmless(finish)(span)


@harmless
def _calling(tracer: Tracer, during_execution: str) -> Span | None:
    attributes: Attributes = {spans.DURING_EXECUTION: during_execution}
    return tracer.start(spans.SCHEMA_SPAN, current(), attributes, role=SpanKind.CLIENT)


def _trace_id(carrier: Carrier) -> int:
    return context_of(carrier).trace_id
