"""BatchStream: one iteration over one split, driven by ``async for`` or by ``for``.

The wire, the fetching of blocks and the cutting of batches advance in plain methods that never
wait: `_refill` does what can be done and returns the future to wait for. An `async for` awaits
it, a `for` blocks on it. Nothing runs in the background: what is in flight are Ray's own
futures, so a wait that is cancelled loses nothing and may be taken up again.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import itertools
import sys
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

import ray

from asyncsplit import engine
from asyncsplit.core.epochs import Stream
from asyncsplit.errors import ConsumerConflictError, StreamClosedError
from asyncsplit.pipeline import Pipeline
from asyncsplit.remote import Coordinator, Reply, ask, opened, settled
from asyncsplit.telemetry.state import ConsumerCounters
from asyncsplit.wire import Delivery, Progress, Slice, Started

T = TypeVar("T")

YIELD_AFTER_S = 0.002
"""How long batches are handed out without letting the event loop run anything else."""

REPORT_AFTER_S = 1.0
"""How long finished rows may stay unacknowledged while no new blocks are needed."""

SMALL_BYTES = 2**20
"""Blocks up to this size are fetched together, at a fraction of what one future each costs;
larger ones are fetched ahead, off the loop, because unpickling them takes time."""

GROUP_BYTES = 4 * 2**20
GROUP_SLICES = 64
"""Bounds of one such group: together they keep the loop for less than 3 ms."""

_END = object()


class StreamStatistics(NamedTuple):
    """What a stream has done so far."""

    epoch: int | None
    """The epoch being read; None before it has started."""
    rows: int
    """Rows handed out."""
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


class Consumer:
    """An iterator object in one process: who reads a split, and its totals over all streams."""

    def __init__(self, coordinator: Coordinator, split: int, serialized_bytes: int) -> None:
        """Make a consumer with a name of its own; it holds nothing until it opens a stream."""
        self.coordinator = coordinator
        self.split = split
        self.serialized_bytes = serialized_bytes
        self.name = uuid.uuid4().hex[:12]
        self.totals = ConsumerCounters()
        self._streams = 0
        self._open: weakref.ref[BatchStream[Any]] | None = None

    def open(self, stream: "BatchStream[Any]") -> Stream:
        """Give a stream its number.

        Raises:
            ConsumerConflictError: If another stream of this consumer is open.
        """
        if self._other_open(stream):
            # One that was cancelled may linger in a cycle of traceback and frames.
            gc.collect(1)
        if self._other_open(stream):
            raise ConsumerConflictError(
                f"split {self.split} is already being iterated by another stream of this"
                " iterator: finish it, or close it with `await stream.aclose()`, first"
            )
        self._open = weakref.ref(stream)
        self._streams += 1
        return Stream(self.name, self._streams)

    def _other_open(self, stream: "BatchStream[Any]") -> bool:
        other = self._open and self._open()
        return other is not None and other is not stream and other.is_open


@dataclass(slots=True)
class _Pending:
    slice: Slice
    fetch: "concurrent.futures.Future[Any] | None" = None


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
        pipeline: Callable[[], Pipeline],
        *,
        prefetch_batches: int,
        batch_size: int | None,
    ) -> None:
        """Describe an iteration; nothing happens until the first batch is asked for."""
        self._consumer = consumer
        self._make_pipeline = pipeline
        self._prefetch = prefetch_batches
        self._batch_size = batch_size
        self._phase = _Phase.NEW
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = False
        self._reset()

    def _reset(self) -> None:
        self._phase = _Phase.NEW
        self._pipeline = self._make_pipeline()
        self._batches: Iterator[T | None] = cast("Iterator[T | None]", self._pipeline.batches)
        self._stream: Stream | None = None
        self._starting: concurrent.futures.Future[Reply[Started]] | None = None
        self._pulling: concurrent.futures.Future[Reply[Delivery]] | None = None
        self._started: Started | None = None
        self._backlog: deque[_Pending] = deque()
        self._backlog_bytes = 0
        self._cursor = 0
        self._fed = 0
        self._last = False
        self._finished_rows = 0
        self._blocks = 0
        self._bytes = 0
        self._ready: object = None
        self._waits_done = 0
        self._wait_s = 0.0
        self._asked_at = 0.0
        self._first_after_s: float | None = None
        self._yield_at = 0.0
        self._report_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the stream holds its split."""
        return self._phase is _Phase.OPEN

    def statistics(self) -> StreamStatistics:
        """Return what this stream has done so far; costs nothing, asks nobody."""
        return StreamStatistics(
            epoch=self._started.epoch if self._started else None,
            rows=self._pipeline.rows_out,
            batches=self._pipeline.batches_out,
            buffered_rows=self._pipeline.rows_buffered,
            buffered_blocks=len(self._backlog),
            wait_s=self._wait_s,
            time_to_first_batch_s=self._first_after_s,
        )

    def __repr__(self) -> str:
        """Show where the stream is."""
        return (
            f"<{type(self).__name__} split={self._consumer.split} {self._phase.value}"
            f" epoch={self._started.epoch if self._started else None}"
            f" rows={self._pipeline.rows_out}>"
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
        now = perf_counter()
        if now >= self._yield_at:
            await self._breathe(now)
        self._finished_rows = self._pipeline.rows_out
        batch = next(self._batches, _END)
        if batch is None:
            batch = await self._next_when_ready(now)
        if batch is _END:
            # The loop goes on when the coordinator knows that everything is committed.
            await _until_told(self._end())
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
        now = perf_counter()
        if now >= self._yield_at:
            self._check(now)
        self._finished_rows = self._pipeline.rows_out
        batch = next(self._batches, _END)
        if batch is None:
            with contextlib.closing(self._waits(now)) as waits:
                for future in waits:
                    concurrent.futures.wait((future,))
            batch = self._take_ready()
        if batch is _END:
            _block_until_told(self._end())
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
        all the same.
        """
        await _until_told(self._release(_Phase.CLOSED))

    def close(self) -> None:
        """Release the split; as `aclose`, but blocks the thread for the round trip."""
        _block_until_told(self._release(_Phase.CLOSED))

    def __del__(self) -> None:
        """Release the split."""
        if self._phase is not _Phase.OPEN or sys.is_finalizing():
            return
        release = self._farewell(_Phase.CLOSED)
        # Garbage may be collected at any moment, also in the middle of a Ray call of this
        # thread: where there is a loop, let it send the message.
        if self._loop is not None and self._loop.is_running():
            self._loop.call_soon_threadsafe(release)
        else:
            release()

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
        if self._started is not None and now >= self._report_at and self.is_open:
            self._finished_rows = self._pipeline.rows_out
            self._report_at = now + REPORT_AFTER_S
            self._send("acknowledge", self._started.epoch, self._stream, self._progress())

    async def _breathe(self, now: float) -> None:
        """Let the event loop run its other tasks; no batch has been taken yet."""
        self._check(now)
        await asyncio.sleep(0)

    async def _next_when_ready(self, now: float) -> object:
        self._loop = asyncio.get_running_loop()
        with contextlib.closing(self._waits(now)) as waits:
            for future in waits:
                await settled(future)
                self._yield_at = perf_counter() + YIELD_AFTER_S
        return self._take_ready()

    def _waits(self, now: float) -> "Generator[concurrent.futures.Future[Any]]":
        """Yield what to wait for, until `_ready` holds a batch or the end."""
        if self._waiting:
            raise ConsumerConflictError(
                "another task is already waiting for a batch of this stream over split"
                f" {self._consumer.split}: one stream serves one loop"
            )
        self._waiting = True
        try:
            while (batch := next(self._batches, _END)) is None:
                if (future := self._refill()) is not None:
                    yield future
            self._ready = batch
            self._waits_done += 1
            if self._first_after_s is None:
                self._first_after_s = perf_counter() - self._asked_at
        except Exception:
            self._release(_Phase.ENDED)
            raise
        finally:
            self._waiting = False
            self._wait_s += perf_counter() - now

    def _take_ready(self) -> object:
        """Hand over the batch and forget it: a reference kept would keep its block in memory."""
        batch, self._ready = self._ready, None
        return batch

    def _refill(self) -> "concurrent.futures.Future[Any] | None":
        """Feed the pipeline if that is possible now; else return what to wait for."""
        if self._started is None:
            starting = self._starting or self._arrive()
            if not starting.done():
                return starting
            self._started = Started(*opened(starting))
            self._cursor = self._started.cursor
            self._report_at = perf_counter() + REPORT_AFTER_S
        fed_before = self._fed
        self._receive()
        if not self._backlog and self._last:
            self._pipeline.finish()
            return None
        waiting_for = self._feed_head() if self._backlog else None
        # Only now, so that the coordinator hears what has been begun: it would let a pull wait
        # for ever that says there is still enough.
        self._pull_if_room(self._started)
        return waiting_for or (None if self._fed > fed_before else self._pulling)

    def _arrive(self) -> "concurrent.futures.Future[Reply[Started]]":
        self._stream = self._consumer.open(self)
        self._phase = _Phase.OPEN
        self._asked_at = perf_counter()
        self._starting = ask(
            self._consumer.coordinator,
            "start_epoch",
            self._consumer.split,
            self._stream,
            self._consumer.serialized_bytes,
            self._consumer.totals,
        )
        return self._starting

    def _receive(self) -> None:
        """Take a delivery that has come."""
        if self._pulling is None or not self._pulling.done():
            return
        delivery = Delivery(*opened(self._pulling))
        self._pulling = None
        self._backlog.extend(_Pending(Slice(*part)) for part in delivery.slices)
        self._backlog_bytes += sum(part.size_bytes for part in delivery.slices)
        self._cursor = delivery.cursor + len(delivery.slices)
        self._last = delivery.end

    def _pull_if_room(self, started: Started) -> None:
        """Have the next delivery on its way if there is room for it."""
        if self._pulling is not None or self._last:
            return
        room = self._backlog_bytes < started.prefetch_bytes if self._prefetch else not self._backlog
        if room:
            self._pulling = self._send(
                "pull", started.epoch, self._stream, self._cursor, self._progress()
            )

    def _feed_head(self) -> "concurrent.futures.Future[Any] | None":
        """Feed what is here of the backlog; if its head is not, return what to wait for."""
        self._fetch_ahead()
        head = self._backlog[0]
        if head.fetch is None:
            head.fetch = self._feed_group()
        if head.fetch is None:
            return None
        if not head.fetch.done():
            return head.fetch
        self._feed([head.fetch.result()])
        return None

    def _fetch_ahead(self) -> None:
        """Have large blocks on their way for as many batches as `prefetch_batches` says."""
        wanted = self._prefetch * (self._batch_size or 1)
        for place, pending in enumerate(self._backlog):
            part = pending.slice
            if place and wanted <= 0:
                break
            if place:
                wanted -= part.stop - part.start if self._batch_size else 1
            if pending.fetch is None and part.size_bytes > SMALL_BYTES:
                pending.fetch = part.ref.future()

    def _feed_group(self) -> "concurrent.futures.Future[Any] | None":
        """Feed the small blocks at the head that are here; if none is, return what to wait for."""
        group: list[Slice] = []
        size = 0
        for pending in self._backlog:
            size += pending.slice.size_bytes
            if pending.fetch is not None or (group and size > GROUP_BYTES):
                break
            group.append(pending.slice)
            if len(group) == GROUP_SLICES:
                break
        refs = list(dict.fromkeys(part.ref for part in group))
        here, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=True)
        if len(here) < len(refs):
            ready = set(here)
            group = list(itertools.takewhile(lambda part: part.ref in ready, group))
        if not group:
            return self._backlog[0].slice.ref.future()
        self._feed(engine.get_ready([part.ref for part in group]))
        return None

    def _feed(self, blocks: list[Any]) -> None:
        for block in blocks:
            part = self._backlog.popleft().slice
            self._backlog_bytes -= part.size_bytes
            self._fed += 1
            self._blocks += 1
            self._bytes += part.size_bytes
            self._pipeline.add(block, part.start, part.stop)

    def _progress(self) -> Progress:
        return Progress(self._finished_rows, self._fed, self._pipeline.oldest_unfinished)

    def _counters(self) -> ConsumerCounters:
        return self._consumer.totals.plus(
            ConsumerCounters(
                rows=self._pipeline.rows_out,
                batches=self._pipeline.batches_out,
                blocks=self._blocks,
                bytes=self._bytes,
                waits=self._waits_done,
                wait_s=self._wait_s,
                stream_s=perf_counter() - self._asked_at,
            )
        )

    def _send(self, method: str, *args: object) -> "concurrent.futures.Future[Any]":
        return ask(
            self._consumer.coordinator, method, self._consumer.split, *args, self._counters()
        )

    def _end(self) -> "concurrent.futures.Future[Any] | None":
        """Commit everything: the loop has asked past the last batch."""
        self._finished_rows = self._pipeline.rows_out + self._pipeline.rows_dropped
        return self._release(_Phase.ENDED)

    def _release(self, phase: _Phase) -> "concurrent.futures.Future[Any] | None":
        """Leave the open phase, if it is that, and tell the coordinator."""
        if self.is_open:
            return self._farewell(phase)()
        if self._phase is _Phase.NEW or phase is _Phase.CLOSED:
            self._phase = phase
            self._yield_at = 0.0
        return None

    def _farewell(self, phase: _Phase) -> "Callable[[], concurrent.futures.Future[Any]]":
        """Let go of everything; return the call that tells the coordinator, free of self."""
        farewell = functools.partial(
            ask,
            self._consumer.coordinator,
            "notify_split_finished",
            self._consumer.split,
            self._stream,
            self._progress(),
            self._counters(),
        )
        self._consumer.totals = self._counters()
        self._phase = phase
        self._yield_at = 0.0
        self._batches = iter(())
        self._pipeline.close()
        self._backlog.clear()
        self._pulling = self._starting = None
        return farewell


async def _until_told(told: "concurrent.futures.Future[Any] | None") -> None:
    # What became of the message does not matter: a coordinator that is gone holds no splits.
    if told is not None:
        await settled(told)


def _block_until_told(told: "concurrent.futures.Future[Any] | None") -> None:
    if told is not None:
        concurrent.futures.wait((told,))


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
