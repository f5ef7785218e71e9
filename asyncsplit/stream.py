"""BatchStream: one iteration over one split, driven by ``async for`` or by ``for``.

The wire, the fetching of blocks and the cutting of batches advance in plain methods that never
wait (`asyncsplit.feed`, `asyncsplit.pipeline`). An `async for` awaits what they are waiting for,
a `for` blocks on it; everything else is the same for both.
"""

import asyncio
import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from enum import Enum
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

from asyncsplit.collate import Collated, Converted
from asyncsplit.consumer import Consumer
from asyncsplit.core.position import Position
from asyncsplit.core.state import check_shuffle
from asyncsplit.errors import ConsumerConflictError, StreamClosedError
from asyncsplit.feed import Feed
from asyncsplit.pipeline import Pipeline
from asyncsplit.remote import quietly, settled
from asyncsplit.telemetry.tracing import FLUSH_S

T = TypeVar("T")

YIELD_AFTER_S = 0.0015
"""How long batches are handed out without letting the event loop run anything else."""

ROUNDS = 3
"""How often the event loop then goes round. A timer that is due makes a future ready in the first,
the future wakes its task in the second, and that runs ahead of the stream in the third."""

RECHECK_S = 1.0
"""How long to wait before seeing whether waiting still makes sense, see `Feed.advance`."""

_END = object()


class StreamStatistics(NamedTuple):
    """What a stream has done so far."""

    epoch: int | None
    """The epoch being read; None before it has started."""
    rows: int
    """Rows handed out."""
    padded_rows: int
    """How many of them repeat others, with ``equal="pad"``: without a local shuffle, the last."""
    batches: int
    """Batches handed out."""
    buffered_rows: int
    """Rows fetched and not yet handed out."""
    buffered_blocks: int
    """Blocks assigned to this stream and not yet begun."""
    wait_s: float
    """Seconds the loop has waited for batches."""
    time_to_first_batch_s: float | None
    """Seconds from asking for the first batch to having it; None before that."""


class _Phase(Enum):
    NEW = "new"
    OPEN = "open"
    ENDED = "ended"
    CLOSED = "closed"


class BatchStream(Generic[T]):
    """Batches of one split for one epoch: an async iterator and an async context manager.

    Also a plain iterator and context manager, with the same semantics, for code without an event
    loop. Iterating waits for all splits to arrive, then delivers this split's share of the epoch.
    A batch counts as finished, and is committed, when the next one is asked for.

    Cancelling a pending ``__anext__`` loses nothing: ask again and the same batch comes. Leaving
    the loop early releases the split as soon as the stream is closed, by leaving ``async with``,
    by `aclose`, or by dropping the object. A stream that has ended starts the next epoch when it
    is iterated again.
    """

    def __init__(
        self,
        consumer: Consumer,
        pipeline: Callable[[], Pipeline | Converted | Collated],
        *,
        prefetch_batches: int,
        batch_size: int | None,
    ) -> None:
        """Describe an iteration; nothing happens until the first batch is asked for."""
        self._consumer = consumer
        self._make_pipeline = pipeline
        self._prefetch = prefetch_batches
        self._batch_size = batch_size
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = False
        self._reset()

    def _reset(self) -> None:
        self._phase = _Phase.NEW
        self._pipeline = self._make_pipeline()
        self._batches = cast("Iterator[T | None]", self._pipeline.batches)
        self._feed: Feed | None = None
        self._finished_rows = 0
        self._ready: object = None
        self._first_after_s: float | None = None
        self._yield_at = 0.0
        self._report_at = math.inf

    @property
    def is_open(self) -> bool:
        """Whether the stream holds its split."""
        return self._phase is _Phase.OPEN

    def statistics(self) -> StreamStatistics:
        """Return what this stream has done so far; costs nothing, asks nobody."""
        feed = self._feed
        return StreamStatistics(
            epoch=feed.started.epoch if feed and feed.started else None,
            rows=self._pipeline.rows_out,
            padded_rows=self._pipeline.padded_rows,
            batches=self._pipeline.batches_out,
            buffered_rows=self._pipeline.rows_buffered,
            buffered_blocks=feed.backlog if feed else 0,
            wait_s=feed.times.wait_s if feed else 0.0,
            time_to_first_batch_s=self._first_after_s,
        )

    def position(self, *, batch_finished: bool = False) -> Position | None:
        """Return where the training loop stands in the epoch; None if the stream is not open.

        With ``batch_finished`` the batch in hand is finished from now on, and not only when the
        next one is asked for.
        """
        if not self.is_open or self._feed is None:
            return None
        if batch_finished:
            self._finished_rows = self._pipeline.rows_out
        return self._feed.position(self._finished_rows)

    def __repr__(self) -> str:
        """Show where the stream is."""
        now = self.statistics()
        return (
            f"<{type(self).__name__} split={self._consumer.split} {self._phase.value}"
            f" epoch={now.epoch} rows={now.rows}>"
        )

    def __aiter__(self) -> Self:
        """Return self; a stream that has ended begins the next epoch."""
        self._begin()
        return self

    async def __anext__(self) -> T:
        """Return the next batch, without suspending if it is ready.

        Raises:
            ConsumerConflictError: If somebody else consumes this split.
            StreamClosedError: If the stream is closed.
            Exception: Whatever the dataset's own code raised.
        """
        self._finished_rows = self._pipeline.rows_out
        now = perf_counter()
        if now >= self._yield_at:
            self._check(now)
            # Before a batch is taken: one that is taken would be lost by a cancellation here.
            await self._leave_loop()
        try:
            batch = next(self._batches, _END)
        except Exception:
            self._release(_Phase.ENDED)
            raise
        if batch is None:
            self._loop = asyncio.get_running_loop()
            with contextlib.closing(self._wait(now)) as waits:
                for future in waits:
                    if future is None:
                        await self._leave_loop()
                        continue
                    await settled(future, RECHECK_S)
                    self._yield_at = perf_counter() + YIELD_AFTER_S
            batch = self._take_ready()
        if batch is _END:
            # The loop goes on when the coordinator knows that everything is committed.
            for told, limit_s in self._end():
                await settled(told, limit_s)
            raise StopAsyncIteration
        return cast("T", batch)

    def __iter__(self) -> Self:
        """Return self; a stream that has ended begins the next epoch."""
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            _warn_blocking()
        self._begin()
        return self

    def __next__(self) -> T:
        """Return the next batch; as `__anext__`, but blocks the thread while it waits."""
        self._finished_rows = self._pipeline.rows_out
        now = perf_counter()
        if now >= self._yield_at:
            self._check(now)
        try:
            batch = next(self._batches, _END)
        except Exception:
            self._release(_Phase.ENDED)
            raise
        if batch is None:
            with contextlib.closing(self._wait(now)) as waits:
                for future in filter(None, waits):
                    futures.wait((future,), RECHECK_S)
            batch = self._take_ready()
        if batch is _END:
            for told, limit_s in self._end():
                futures.wait((told,), limit_s)
            raise StopIteration
        return cast("T", batch)

    async def __aenter__(self) -> Self:
        """Return self."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the stream."""
        await self.aclose()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the stream."""
        self.close()

    async def aclose(self) -> None:
        """Release the split and return when the coordinator knows; closing twice is no error.

        Rows of batches not asked past are not committed. If cancelled, the split is released
        all the same; so it is if the coordinator is gone.
        """
        for told, limit_s in self._release(_Phase.CLOSED):
            await settled(told, limit_s)

    def close(self) -> None:
        """Release the split; as `aclose`, but blocks the thread for the round trip."""
        for told, limit_s in self._release(_Phase.CLOSED):
            futures.wait((told,), limit_s)

    def __del__(self) -> None:
        """Release the split."""
        if self._phase is not _Phase.OPEN or sys.is_finalizing():
            return
        farewell = functools.partial(quietly, self._forget(_Phase.CLOSED))
        # Garbage may be collected at any moment, also in the middle of a Ray call of this
        # thread: where there is a loop, let it send the message.
        if self._loop is not None and self._loop.is_running():
            self._loop.call_soon_threadsafe(farewell)
        else:
            farewell()

    def _begin(self) -> None:
        if self._phase is _Phase.CLOSED:
            raise StreamClosedError(
                f"this stream over split {self._consumer.split} is closed:"
                " call iter_batches() again for another one"
            )
        if self._phase is _Phase.ENDED:
            self._reset()

    def _check(self, now: float) -> None:
        """Do what is due every few milliseconds, before a batch is taken."""
        if self._phase is _Phase.CLOSED:
            self._begin()
        self._yield_at = now + YIELD_AFTER_S
        if self._feed is not None and now >= self._report_at and self.is_open:
            self._report_at = now + self._feed.report_after_s
            self._feed.acknowledge(self._finished_rows)

    async def _leave_loop(self) -> None:
        """Let whoever is ready in the event loop run, and begin another turn."""
        left = perf_counter()
        for _ in range(ROUNDS):
            await asyncio.sleep(0)
        resumed = perf_counter()
        # Counted from before, a turn among other streams would be over as it began.
        self._yield_at = resumed + YIELD_AFTER_S
        if (feed := self._feed) and (lag_s := resumed - left) > feed.times.lag_s:
            feed.times.lag_s = lag_s

    def _wait(self, now: float) -> "Generator[futures.Future[Any] | None]":
        """Yield what to wait for, until `_ready` holds a batch or the end.

        None stands for others' turn in the event loop: a batch of many blocks takes long to make.
        """
        if self._waiting:
            raise ConsumerConflictError(
                "another task is already waiting for a batch of this stream over split"
                f" {self._consumer.split}: one stream serves one loop"
            )
        feed = self._feed or self._open()
        times = feed.times
        self._waiting = True
        times.wait(asked_at=now)
        if feed.spans is not None:
            feed.spans.waits()
        try:
            while (batch := next(self._batches, _END)) is None:
                future = self._pipeline.conversion or feed.advance(self._finished_rows)
                if future is not None:
                    cause, began = feed.cause_of(future), perf_counter()
                    try:
                        yield future
                    finally:
                        times.waited_for(cause, perf_counter() - began)
                elif perf_counter() >= self._yield_at:
                    yield None
            self._ready = batch
            seconds = times.got(perf_counter(), batch=batch is not _END)
            if feed.spans is not None:
                feed.spans.got(seconds)
            if self._first_after_s is None:
                now = perf_counter()
                self._first_after_s = now - times.began
                self._report_at = now + feed.report_after_s
        except Exception as error:
            if feed.spans is not None:
                feed.spans.failed(error)
            self._release(_Phase.ENDED)
            raise
        finally:
            self._waiting = False
            times.go_on(perf_counter())

    def _open(self) -> Feed:
        check_shuffle(self._consumer.position, self._pipeline.shuffle, self._consumer.split)
        stream = self._consumer.open(self, shuffles=self._pipeline.shuffle is not None)
        self._phase = _Phase.OPEN
        self._feed = Feed(
            self._consumer,
            stream,
            self._pipeline,
            prefetch_batches=self._prefetch,
            batch_size=self._batch_size,
        )
        if isinstance(self._pipeline, Collated):
            self._pipeline.draw_from(self._feed.advance)
        return self._feed

    def _take_ready(self) -> object:
        """Hand over the batch and forget it: a reference kept would keep its block in memory."""
        batch, self._ready = self._ready, None
        return batch

    def _end(self) -> "list[tuple[futures.Future[Any], float | None]]":
        """Commit everything: the loop has asked past the last batch."""
        self._finished_rows += self._pipeline.rows_dropped
        told = self._release(_Phase.ENDED)
        started = None if self._feed is None else self._feed.started
        if told and started is not None and started.more and self._pipeline.shuffle is None:
            self._consumer.arrive_early()
        return told

    def _release(self, phase: _Phase) -> "list[tuple[futures.Future[Any], float | None]]":
        """Leave the open phase, if it is that, and tell the coordinator.

        Returns:
            What to wait for, and how long.
        """
        if self.is_open:
            spans = None if self._feed is None else self._feed.spans
            told: list[tuple[futures.Future[Any], float | None]] = [(self._forget(phase)(), None)]
            if spans is not None and (flushed := spans.flush()) is not None:
                told.append((flushed, FLUSH_S))
            return told
        if self._phase is _Phase.NEW or phase is _Phase.CLOSED:
            self._phase = phase
            self._yield_at = 0.0
        return []

    def _forget(self, phase: _Phase) -> "Callable[[], futures.Future[Any]]":
        """Let go of all data; return the call that tells the coordinator, free of self."""
        assert self._feed is not None
        farewell = self._feed.close(self._finished_rows)
        if (spans := self._feed.spans) is not None:
            rows, batches = self._pipeline.rows_out, self._pipeline.batches_out
            spans.ended(completed=phase is _Phase.ENDED, rows=rows, batches=batches)
        self._phase = phase
        self._yield_at = 0.0
        self._batches = iter(())
        self._pipeline.close()
        return farewell


def _warn_blocking() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "a plain `for` over a BatchStream blocks the event loop it runs in while it waits:"
            " use `async for`",
            RuntimeWarning,
            stacklevel=3,
        )


_warned = False
