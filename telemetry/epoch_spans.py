"""The spans that a coordinator records: of its epochs, and of the calls it answers."""

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from opentelemetry.trace import Span, SpanKind

from asyncsplit.core.ledger import Ledger
from asyncsplit.telemetry import spans
from asyncsplit.telemetry.catalog import MAX_SPLIT_LABELS
from asyncsplit.telemetry.tracing import (
    FAREWELL_S,
    Attributes,
    Carrier,
    Tracer,
    carrier_of,
    context_of,
    finish,
    harmless,
)

PULLS = 128
"""Pulls of an epoch that get a span before only longer ones do."""

FAILED_PULLS = 8
"""Pulls of an epoch whose failure is recorded: it is the same for all of them."""


@dataclass
class _Arrival:
    at_ns: int
    trace: Carrier | None
    """The span that the epoch is to be a part of, if it is the first to arrive."""


@dataclass
class _Start:
    since_ns: int
    ahead: bool
    until_ns: int | None = None
    error: BaseException | None = None


@dataclass
class _Epoch:
    """An epoch that is recorded."""

    number: int
    span: Span
    carrier: Carrier
    longest: spans.Longest = field(default_factory=lambda: spans.Longest(PULLS))
    dead: dict[int, int] = field(default_factory=dict)
    """Splits whose consumer has died, and when that was known."""


class EpochSpans:
    """Records what one coordinator does; every method does nothing if there is no tracer."""

    def __init__(self, tracer: Tracer | None, splits: int) -> None:
        """Record with a tracer; nothing is under way."""
        self._tracer = tracer
        self._splits = splits
        self._arrivals: dict[int, _Arrival] = {}
        self._epoch: _Epoch | None = None
        self._failed_pulls = 0
        self._starts: dict[int, _Start] = {}

    @property
    def carrier(self) -> Carrier | None:
        """The epoch under way, for consumers; None if it is not recorded."""
        return None if self._epoch is None else self._epoch.carrier

    @harmless
    def arrived(self, split: int, trace: Carrier | None) -> None:
        """Note that a split has come to the barrier, and in which trace."""
        if self._tracer is not None:
            self._arrivals[split] = _Arrival(time.time_ns(), trace)

    @harmless
    def opened(self, number: int, splits: Collection[int]) -> None:
        """Begin an epoch with those who have arrived."""
        if self._tracer is None:
            return
        self._epoch = self._begin(number, splits)
        self._failed_pulls = 0
        for given_up in [each for each in self._starts if each < number]:
            del self._starts[given_up]
        self._record_start(number)

    @harmless
    def gave_up(self, number: int, splits: Collection[int], error: BaseException) -> None:
        """Record an epoch whose barrier did not open, if anybody waited for it."""
        if self._tracer is None or not splits:
            return
        if (epoch := self._begin(number, splits, error)) is not None:
            finish(epoch.span, error, attributes={spans.OUTCOME: "failed"})

    @harmless
    def executor_starts(self, number: int) -> None:
        """Note that the executor is being started for an epoch, which may not have begun."""
        if self._tracer is not None:
            ahead = self._epoch is None or self._epoch.number != number
            self._starts[number] = _Start(time.time_ns(), ahead)

    @harmless
    def executor_started(self, number: int, error: BaseException | None) -> None:
        """Note that it has started, or that it could not."""
        if (start := self._starts.get(number)) is not None:
            start.until_ns, start.error = time.time_ns(), error
            self._record_start(number)

    @harmless
    def ended(self, outcome: str, ledger: Ledger, error: BaseException | None) -> None:
        """End the epoch under way and send it: a driver that ends kills the coordinator."""
        if self._tracer is None or self._epoch is None:
            return
        epoch, self._epoch = self._epoch, None
        rows = sum(ledger.committed_rows)
        finish(epoch.span, error, attributes={spans.OUTCOME: outcome, spans.ROWS: rows})
        self._tracer.flush()

    @harmless
    def died(self, split: int) -> None:
        """Note that a split's consumer is known to be dead."""
        if self._epoch is not None:
            self._epoch.dead[split] = time.time_ns()

    @harmless
    def replaced(self, split: int, trace: Carrier | None) -> None:
        """Record that another consumer goes on in the place of a dead one."""
        if self._tracer is None or (epoch := self._epoch) is None:
            return
        attributes: Attributes = {
            spans.SPLIT: split,
            spans.EPOCH: epoch.number,
            spans.REASON: "consumer_died",
        }
        since_ns = epoch.dead.pop(split, time.time_ns())
        links = [trace] if _elsewhere(trace, epoch.carrier) else []
        self._tracer.record(spans.REJOIN_SPAN, epoch.carrier, attributes, since_ns, links=links)

    @contextlib.contextmanager
    def pull(self, split: int, epoch: int, trace: Carrier) -> Iterator[dict[spans.Attribute, int]]:
        """Record a pull if it takes long or fails; ``trace`` is the stream's span."""
        attributes: dict[spans.Attribute, int] = {}
        if self._tracer is None:
            yield attributes
            return
        since_ns, began = time.time_ns(), time.perf_counter()
        attributes |= {spans.SPLIT: split, spans.EPOCH: epoch}
        try:
            yield attributes
        except Exception as error:
            self._pulled(trace, attributes, since_ns, error)
            raise
        if self._epoch is not None and self._epoch.longest.picks(time.perf_counter() - began):
            self._pulled(trace, attributes, since_ns, None)

    @contextlib.contextmanager
    def schema(self, during_execution: str, trace: Carrier | None) -> Iterator[None]:
        """Record the answer to a call; ``trace`` is the caller's span."""
        span = self._answering(during_execution, trace)
        try:
            yield
        except Exception as error:
            if span is not None:
                harmless(finish)(span, error)
            raise
        if span is not None:
            harmless(finish)(span)

    def close(self) -> None:
        """End what is under way and send it; blocks for two seconds at most."""
        if self._tracer is None:
            return
        if self._epoch is not None:
            harmless(finish)(self._epoch.span, attributes={spans.OUTCOME: "stopped"})
            self._epoch = None
        if (flushed := self._tracer.flush()) is not None:
            with contextlib.suppress(TimeoutError):
                flushed.result(FAREWELL_S)

    def _begin(
        self, number: int, splits: Collection[int], error: BaseException | None = None
    ) -> _Epoch | None:
        """Start an epoch's span where its first consumer arrived, and record the barrier's."""
        assert self._tracer is not None
        now_ns = time.time_ns()
        arrivals = {split: self._arrivals.pop(split, _Arrival(now_ns, None)) for split in splits}
        in_order = sorted(arrivals, key=lambda split: arrivals[split].at_ns)
        since_ns = arrivals[in_order[0]].at_ns if in_order else now_ns
        traces = [arrivals[split].trace for split in in_order]
        parent = next((trace for trace in traces if trace is not None), None)
        span = self._tracer.start(
            spans.EPOCH_SPAN,
            parent,
            {spans.SPLITS: self._splits, spans.EPOCH: number},
            since_ns=since_ns,
            links=[one for one in traces[:MAX_SPLIT_LABELS] if _elsewhere(one, parent)],
        )
        if span is None:
            return None
        epoch = _Epoch(number, span, carrier_of(span))
        barrier = self._tracer.start(
            spans.BARRIER_SPAN, epoch.carrier, {spans.EPOCH: number}, since_ns=since_ns
        )
        if barrier is not None:
            for split in in_order[-MAX_SPLIT_LABELS:]:
                barrier.add_event(
                    spans.ARRIVAL_EVENT, {spans.SPLIT.name: split}, arrivals[split].at_ns
                )
            last: Attributes = {spans.LAST_SPLIT: in_order[-1]} if in_order else {}
            finish(barrier, error, now_ns, last)
        return epoch

    def _record_start(self, number: int) -> None:
        """Record the start of an executor, once it is over and its epoch has begun."""
        epoch, start = self._epoch, self._starts.get(number)
        if self._tracer is None or epoch is None or start is None:
            return
        if epoch.number != number or start.until_ns is None:
            return
        del self._starts[number]
        self._tracer.record(
            spans.START_SPAN,
            epoch.carrier,
            {spans.EPOCH: number, spans.AHEAD: start.ahead},
            start.since_ns,
            until_ns=start.until_ns,
            error=start.error,
        )

    @harmless
    def _pulled(
        self, trace: Carrier, attributes: Attributes, since_ns: int, error: BaseException | None
    ) -> None:
        assert self._tracer is not None
        if error is not None:
            self._failed_pulls += 1
            if self._failed_pulls > FAILED_PULLS:
                return
        self._tracer.record(spans.PULL_SPAN, trace, attributes, since_ns, error=error)

    @harmless
    def _answering(self, during_execution: str, trace: Carrier | None) -> Span | None:
        if self._tracer is None or trace is None:
            return None
        attributes: Attributes = {spans.DURING_EXECUTION: during_execution}
        return self._tracer.start(spans.SCHEMA_ANSWER_SPAN, trace, attributes, role=SpanKind.SERVER)


def _elsewhere(one: Carrier | None, other: Carrier | None) -> bool:
    """Tell whether two spans are of different traces."""
    if one is None or other is None:
        return False
    return context_of(one).trace_id != context_of(other).trace_id
