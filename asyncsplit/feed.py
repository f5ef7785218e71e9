"""Feed: what is on its way from the coordinator to a stream's pipeline.

Nothing here waits: `Feed.advance` does what can be done and returns the future to wait for. What
is in flight are Ray's own futures, so a wait that is cancelled loses nothing.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter
from typing import Any, Literal

from ray.exceptions import ObjectLostError

from asyncsplit.backlog import Backlog
from asyncsplit.collate import Collated, Converted
from asyncsplit.consumer import Consumer
from asyncsplit.core.epochs import Stream
from asyncsplit.core.pace import rows_ahead
from asyncsplit.core.position import Position
from asyncsplit.core.progress import Progress, Reading
from asyncsplit.pipeline import Pipeline
from asyncsplit.remote import Reply, ask, opened
from asyncsplit.telemetry.counters import ConsumerCounters, StreamTimes
from asyncsplit.wire import REPORT_AFTER_S, Delivery, Rejoin, Slice, Started

FEED_S = 0.0005
"""After how long the loop gets a chance while blocks are unpickled, which takes much longer."""


class Feed:
    """Pulls one stream's slices, fetches their blocks and feeds a pipeline."""

    def __init__(
        self,
        consumer: Consumer,
        stream: Stream,
        pipeline: Pipeline | Converted | Collated,
        *,
        prefetch_batches: int,
        batch_size: int | None,
    ) -> None:
        """Arrive at the barrier."""
        self.started: Started | None = None
        self.times = StreamTimes(perf_counter())
        self.spans = consumer.spans(self.times)
        self._consumer = consumer
        self._stream = stream
        self._pipeline = pipeline
        self._prefetch = prefetch_batches
        self._batch_size = batch_size
        self._backlog = Backlog(
            prefetch_batches=prefetch_batches,
            batch_size=batch_size,
            plain=pipeline.takes_plain,
        )
        self._reading = Reading(consumer.position)
        self._cursor: int | None = None
        self._fed_bytes = 0
        self._local_blocks = self._remote_blocks = 0
        self._last = False
        self._lost_at = -1
        self._pulling: Future[Any] | None = None
        self._asked_early = False
        early = consumer.take_early()
        self._unheard = early is not None
        """Whether the coordinator does not know yet that this loop has begun."""
        self._starting: Future[Reply[Started]] | None = early or self._arrive(consumer.position)

    @property
    def backlog(self) -> int:
        """How many slices have been delivered and not begun."""
        return len(self._backlog)

    @property
    def report_after_s(self) -> float:
        """How long finished rows may stay unacknowledged while no new blocks are needed."""
        return REPORT_AFTER_S if self.started is None else self.started.report_after_s

    def advance(self, finished_rows: int) -> "Future[Any] | None":
        """Feed the pipeline if that is possible now; else return what to wait for.

        ``finished_rows`` is how many rows the training loop has finished with.

        Raises:
            Exception: Whatever the coordinator answered, or fetching a block failed with.
        """
        if self._starting is None:
            self._receive(finished_rows)
        if self._starting is not None:
            if not self._starting.done():
                return self._starting
            if self.spans is not None and not self.spans.opened.done():
                return self.spans.opened
            self._start(opened(self._starting))
        if not self._backlog and self._last:
            self._pipeline.finish()
            return None
        fed_before = self._reading.fed
        waiting_for = self._try_to_feed() if self._backlog else None
        # Only now, so that the coordinator hears what has been begun: it would let a pull wait
        # for ever that says there is still enough.
        self._pull_if_room(finished_rows)
        if self._unheard:  # and so no pull was sent, perhaps until the end
            self._unheard = False
            self.acknowledge(finished_rows)
        return waiting_for or (None if self._reading.fed > fed_before else self._pulling)

    def acknowledge(self, finished_rows: int, ahead: int | None = None) -> None:
        """Commit what the loop has finished with, without asking for more."""
        if self.started is not None:
            ask(
                self._consumer.coordinator,
                "acknowledge",
                self._consumer.reader,
                self.started.epoch,
                self._stream,
                self._progress(finished_rows),
                self.counters(),
                ahead,
            )

    def close(self, finished_rows: int) -> "Callable[[], Future[Any]]":
        """Let go of everything; return the call that says goodbye, which holds no data."""
        self._backlog.clear()
        counters = self._consumer.totals = self.counters()
        if self.started is not None:
            self._consumer.position = Position(self.started.epoch + 1)
        self._pulling = None
        return functools.partial(
            self._consumer.lifeline.ask,
            "notify_split_finished",
            self._consumer.reader,
            self._stream,
            None if self.started is None else self._progress(finished_rows),
            counters,
        )

    def counters(self) -> ConsumerCounters:
        """Return the consumer's totals, this stream's included."""
        return self._consumer.totals.plus(
            self.times.totals(
                perf_counter(),
                rows=self._pipeline.rows_out,
                batches=self._pipeline.batches_out,
                blocks=self._reading.begun,
                local_blocks=self._local_blocks,
                remote_blocks=self._remote_blocks,
                size_bytes=self._fed_bytes,
                backlog_bytes=self._backlog.size_bytes,
            )
        )

    def cause_of(self, wait: "Future[Any]") -> Literal["barrier", "data", "transfer", "conversion"]:
        """Tell what a future stands for that `advance` returned, or the pipeline waits for."""
        if wait is self._pipeline.conversion:
            return "conversion"
        if self._starting is not None:
            return "barrier"
        return "data" if wait is self._pulling else "transfer"

    def position(self, finished_rows: int) -> Position:
        """Return where the training loop stands, having finished with so many rows."""
        pipeline = self._pipeline
        return self._reading.position(finished_rows, pipeline.oldest_unfinished, pipeline.shuffle)

    def _arrive(self, position: Position | None) -> "Future[Reply[Started]]":
        trace = None if self.spans is None else self.spans.arrives_in
        return self._consumer.arrive(self._stream, position, self._pipeline.shuffle, trace)

    def _start(self, started: Started) -> None:
        """Begin to pull; after a restart of the coordinator, what has not been begun yet."""
        if self._cursor is None:
            self.started = started._replace(delivery=None)
            self._consumer.repeatable = started.repeatable
            self.times.started_at = perf_counter()
            self._reading.start(started.position)
            if started.delivery is not None:
                self._take(started.delivery)
        self._starting = None
        if self.spans is not None:
            self.spans.started(started.epoch, started.trace)

    def _rejoin(self, finished_rows: int) -> None:
        """Arrive again: the coordinator was restarted, and the blocks it had sent are gone."""
        self._drop_backlog()
        if not self._reading.fed:
            self._cursor = None  # it begins anew, maybe in another order: that of its fellows
        if self.spans is not None:
            self.spans.rejoins()
        self._starting = self._arrive(self.position(finished_rows))

    def _drop_backlog(self) -> None:
        self._backlog.clear()
        self._pulling = None
        self._last = False
        if self._cursor is not None:
            self._cursor = self._reading.fed

    def _receive(self, finished_rows: int) -> None:
        """Take a delivery that has come."""
        if self._pulling is None or not self._pulling.done():
            return
        reply: Delivery | Rejoin = opened(self._pulling)
        self._pulling = None
        if isinstance(reply, Rejoin):
            self._rejoin(finished_rows)
        else:
            self._take(reply)

    def _take(self, reply: Delivery) -> None:
        if self._cursor is None:
            assert self.started is not None
            first_rows = reply.slices[0].stop - reply.slices[0].start if reply.slices else 0
            self._reading.deliver(reply.cursor, reply.skip_rows, reply.check, first_rows)
            began = self.started.position
            if began.shuffle is not None:
                self._pipeline.resume(reply.skipped, began.rows, began.shuffle.seed)
        self._backlog.extend(reply.slices)
        self._cursor = reply.cursor + len(reply.slices)
        self._last = reply.end

    def _pull_if_room(self, finished_rows: int) -> None:
        """Have the next delivery on its way if there is room for it."""
        if self._last or self.started is None:
            return
        ahead = self._rows_ahead() if self.started.on_demand else None
        if self._pulling is not None:
            if self._asked_early and ahead is not None and ahead <= 0:
                self._asked_early = False
                self.acknowledge(finished_rows, ahead)
            return
        budget = self.started.prefetch_bytes
        room = self._backlog.size_bytes < budget if self._prefetch else not self._backlog
        if room:
            self._asked_early = ahead is not None and ahead > 0
            self._unheard = False
            self._pulling = ask(
                self._consumer.coordinator,
                "pull",
                self._consumer.reader,
                self.started.epoch,
                self._stream,
                self._cursor,
                self._progress(finished_rows),
                self.counters(),
                None if self.spans is None else self.spans.carrier,
                ahead,
            )

    def _rows_ahead(self) -> int:
        pipeline = self._pipeline
        rows = pipeline.rows_buffered - (pipeline.shuffle.buffer_size if pipeline.shuffle else 0)
        if isinstance(pipeline, Collated):
            if self._batch_size is None:
                return -1  # how many rows are to be made ahead depends on what comes
            rows -= pipeline.ahead * self._batch_size
        return rows_ahead(rows, self._batch_size or 1)

    def _try_to_feed(self) -> "Future[Any] | None":
        """Feed what is here; if blocks are gone with their owner, ask for them once more."""
        try:
            return self._feed_head()
        except ObjectLostError:
            if self._lost_at == self._reading.fed:
                raise
            self._lost_at = self._reading.fed
            self._drop_backlog()
            return None

    def _feed_head(self) -> "Future[Any] | None":
        """Feed what is here of the backlog; if its head is not, return what to wait for."""
        waiting_for = self._backlog.fetch()
        if waiting_for is not None:
            if not self._backlog.is_overdue:
                return waiting_for
            self._drop_backlog()
            return None
        until = perf_counter() + FEED_S
        while self._backlog.is_here:
            self._feed(*self._backlog.pop())
            if perf_counter() >= until:
                break
        return None

    def _feed(self, part: Slice, block: Any) -> None:
        self._fed_bytes += part.size_bytes
        self._local_blocks += part.node_id == self._backlog.node_id
        self._remote_blocks += part.node_id not in (None, self._backlog.node_id)
        skipped = self._reading.begin(part.stop - part.start)
        self._pipeline.add(block, part.start + skipped, part.stop, padding=part.padding)

    def _progress(self, finished_rows: int) -> Progress:
        return self._reading.progress(finished_rows, self._pipeline.oldest_unfinished)
