"""Consumer: who reads a split, as long as its iterator object lives."""

import functools
import gc
import uuid
import weakref
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from asyncsplit.core.epochs import Stream
from asyncsplit.core.position import Position
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.errors import ConsumerConflictError
from asyncsplit.lifeline import OwnLifeline
from asyncsplit.remote import Coordinator, Reply, ask, quietly
from asyncsplit.telemetry.counters import ConsumerCounters, StreamTimes
from asyncsplit.telemetry.stream_spans import StreamSpans
from asyncsplit.telemetry.tracing import Carrier, Tracer, Tracing
from asyncsplit.wire import Started


class HasSplit(Protocol):
    """A stream, as far as its consumer cares."""

    @property
    def is_open(self) -> bool:
        """Whether the stream holds its split."""
        ...

    def position(self, *, batch_finished: bool = False) -> Position | None:
        """Return where the training loop stands, if the stream is open."""
        ...


class Early(NamedTuple):
    """An arrival for an epoch that is known to come, before its loop begins."""

    stream: Stream
    answer: "Future[Reply[Started]]"
    give_up: "weakref.finalize[..., Consumer]"
    """Says goodbye; with the consumer it is called."""


class Consumer:
    """An iterator object in one process: who reads a split, and its totals over all streams."""

    def __init__(
        self,
        coordinator: Coordinator,
        split: int,
        serialized_bytes: int,
        keep: object = None,
        tracing: Tracing | None = None,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        """Make a consumer with a name of its own; it has no stream yet.

        ``keep`` is kept: a dataset may hold blocks, and between the death of a coordinator and its
        restart nobody else might.
        """
        self._keep = keep
        self.coordinator = coordinator
        self.split = split
        self.replica = replica
        self.replicas = replicas
        self.reader = split * replicas + replica
        """Its number, through all splits: see `asyncsplit.core.readers`."""
        self.serialized_bytes = serialized_bytes
        self.name = uuid.uuid4().hex[:12]
        self.totals = ConsumerCounters()
        self.position: Position | None = None
        """Where its next stream is to begin, if it has had one or a state was loaded."""
        self.repeatable = True
        """Whether an epoch of which it has read a part can be resumed, as far as known."""
        self.streams = 0
        """How many streams it has had."""
        self.was_sent = False
        """Whether its iterator was pickled: then others may read the split in its place."""
        self.tracing = tracing
        """How spans are recorded; None if they are not."""
        self._early: Early | None = None
        self._tracer: Future[Tracer | None] | None = None
        self._open: weakref.ref[HasSplit] | None = None

    def open(self, stream: HasSplit, *, shuffles: bool) -> Stream:
        """Give a stream its number: that of an early arrival, unless it is to be shuffled.

        Raises:
            ConsumerConflictError: If another stream of this consumer is open.
        """
        # One that was cancelled may linger in a cycle of traceback and frames; after a long loop
        # only a full collection finds it, which costs less than a loop that is refused.
        for generation in (1, 2):
            if self._other_open(stream):
                gc.collect(generation)
        if self._other_open(stream):
            raise ConsumerConflictError(
                f"split {self.split} is already being iterated by another stream of this"
                " iterator: finish it, or close it with `await stream.aclose()`, first"
            )
        self._open = weakref.ref(stream)
        if shuffles:
            self.give_up_early()
        return self._next() if self._early is None else self._early.stream

    def arrive(
        self,
        stream: Stream,
        position: Position | None,
        shuffle: ShuffleKey | None = None,
        trace: Carrier | None = None,
        *,
        early: bool = False,
    ) -> "Future[Reply[Started]]":
        """Call for a stream's epoch; ``early`` says that its loop has not begun."""
        return ask(
            self.coordinator,
            "start_epoch",
            self.reader,
            stream,
            self.lifeline.call,
            position,
            shuffle,
            self.serialized_bytes,
            self.totals,
            trace,
            early,
        )

    def arrive_early(self) -> None:
        """Arrive for the next epoch, which is known to come: its first blocks come here at once.

        Not if somebody else may read it, a copy or a replica that has to draw the same order, nor
        if its spans are to be a part of a loop's that has not begun.
        """
        if self.was_sent or self.replicas > 1 or self.tracing is not None:
            return
        stream = self._next()
        farewell = functools.partial(
            self.lifeline.ask, "notify_split_finished", self.reader, stream, None, self.totals
        )
        answer = self.arrive(stream, self.position, early=True)
        self._early = Early(stream, answer, weakref.finalize(self, quietly, farewell))
        self._early.give_up.atexit = False

    def take_early(self) -> "Future[Reply[Started]] | None":
        """Return the answer to an early arrival, if it is here and is not an error.

        If it is not, whoever arrives again, for the same stream, gets to know.
        """
        early, self._early = self._early, None
        if early is None:
            return None
        early.give_up.detach()
        answer = early.answer
        here = answer.done() and answer.exception() is None
        return answer if here and isinstance(answer.result(), Started) else None

    def give_up_early(self) -> None:
        """Leave the place of an early arrival to whoever comes."""
        if self._early is not None:
            self._early.give_up()
        self._early = None

    def _next(self) -> Stream:
        self.streams += 1
        return Stream(self.name, self.streams)

    def where(self, *, batch_finished: bool = False) -> Position:
        """Return what the training loop has finished with; see `BatchStream.position`."""
        stream = None if self._open is None else self._open()
        read = None if stream is None else stream.position(batch_finished=batch_finished)
        return read or self.position or Position(0)

    @functools.cached_property
    def lifeline(self) -> OwnLifeline:
        """What shows the coordinator that this process lives, from the first stream on."""
        return OwnLifeline.of(self.coordinator)

    def spans(self, times: StreamTimes) -> StreamSpans | None:
        """Return what records a stream, None if nothing does; to be called where it is iterated."""
        if (opened := self.tracer()) is None or self.tracing is None:
            return None
        return StreamSpans(self.tracing, opened, self.reader, times)

    def tracer(self) -> "Future[Tracer | None] | None":
        """Return what will be this consumer's tracer; None if spans are not recorded."""
        if self._tracer is None and self.tracing is not None:
            self._tracer = self.tracing.open_aside()
        return self._tracer

    def _other_open(self, stream: HasSplit) -> bool:
        other = None if self._open is None else self._open()
        return other is not None and other is not stream and other.is_open
