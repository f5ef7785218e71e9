"""SplitCoordinator: the async Ray actor that owns a dataset's execution and its splits.

A thin shell: who may start, which split gets a block and what is acknowledged is decided in
`asyncsplit.core`, and carried out by `asyncsplit.runner`; this class answers. Every method is
``async def`` and none blocks: Ray Data's blocking calls run on one thread of their own
(`asyncsplit.guard`), taking blocks on another (`asyncsplit.pump`).
"""

import asyncio
import contextlib
import gc
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import ObjectRef
from ray.data import DataContext, Dataset, Schema

from asyncsplit import engine
from asyncsplit.core.epochs import Stream
from asyncsplit.core.position import Position
from asyncsplit.core.progress import Progress
from asyncsplit.core.routing import Equal
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.guard import DuringExecution, Guard
from asyncsplit.journal import Journal
from asyncsplit.options import SplitOptions
from asyncsplit.parcel import unpack
from asyncsplit.runner import EpochRunner
from asyncsplit.sharing import Sharing
from asyncsplit.telemetry.counters import ConsumerCounters
from asyncsplit.telemetry.epoch_spans import EpochSpans
from asyncsplit.telemetry.outlets import Outlets
from asyncsplit.telemetry.spans import SLICES
from asyncsplit.telemetry.state import CoordinatorState
from asyncsplit.telemetry.summary import summary
from asyncsplit.telemetry.tracing import Carrier, Tracing
from asyncsplit.wire import Delivery, Lifeline, Rejoin, Started, Status, replies

FIRST_BLOCKS_S = 0.05
"""How long the answer to an arrival waits for blocks to bring along: where all arrive at once, the
executor has only just started, and the first pull would come while it keeps the interpreter."""


class SplitCoordinator:
    """Coordinates the consumers of one dataset's splits."""

    def __init__(
        self,
        n: int,
        equal: Equal,
        locality_hints: Sequence[str] | None,
        options: SplitOptions,
        *pieces: bytes,
    ) -> None:
        """Put the dataset together and set up; nothing runs until all splits have arrived."""
        dataset: Dataset = unpack(pieces)
        self._context = dataset.context.copy()
        engine.use_context(self._context)
        self._state = CoordinatorState.of(
            engine.dataset_tag(dataset),
            n * options.replicas,
            dataset.name,
            lambda: self._runner.distribution,
        )
        blocking = ThreadPoolExecutor(1, thread_name_prefix="asyncsplit-blocking")
        self._guard = Guard(dataset, blocking, self._state)
        tracing = Tracing.of(options.telemetry, dataset.name)
        self._spans = EpochSpans(tracing and tracing.open(), n * options.replicas)
        keeps_order = dataset.context.execution_options.preserve_order
        self._journal = Journal(engine.actor_file(), n * options.replicas)
        self._runner = EpochRunner(
            Sharing(n, equal, locality_hints, options, keeps_order=keeps_order),
            options,
            guard=self._guard,
            state=self._state,
            journal=self._journal,
            spans=self._spans,
        )
        self._outlets = Outlets(self._state, options.telemetry)
        self._kept: Sequence[ObjectRef[Any]] = ()
        # What is here now stays, Ray and Arrow and pandas, and this process is the coordinator's
        # alone: to look through all of that for garbage would hold the loop for 100 ms.
        gc.freeze()

    def __ray_shutdown__(self) -> None:
        """Stop executing before the process ends: Ray calls this when it lets the actor go.

        Threads still at work when Ray's own part of the process is taken down can corrupt its
        memory, and leave behind a process that writes one stack trace after the other.
        """
        joins = [distribution.stop() for distribution in self._runner.distributions]
        self._guard.close()
        for join in joins:
            join()
        self._journal.remove()
        self._spans.close()
        self._outlets.close()

    async def keep(self, refs: "Sequence[ObjectRef[Any]]") -> None:
        """Keep what the dataset refers to, as long as this process lives."""
        self._kept = refs

    @replies
    async def start_epoch(
        self,
        split: int,
        stream: Stream,
        lifeline: Lifeline,
        position: Position | None,
        shuffle: ShuffleKey | None,
        serialized_bytes: int,
        counters: ConsumerCounters,
        trace: Carrier | None = None,
        early: bool = False,
    ) -> Started:
        """Arrive at the barrier; return when the next epoch has started.

        Whoever comes for a split whose consumer has died in the middle of an epoch does not wait:
        it takes that epoch over, from the first row that is not committed.

        ``lifeline`` is its process's call of `hold`; ``position`` is where it stands, if it has
        read the split before; ``shuffle`` what its order is drawn from; ``serialized_bytes`` is the
        pickled size of its iterator, 0 if it never was; ``trace`` the span that the epoch is to be
        a part of; ``early`` says that its loop has not begun, so that nobody waits.
        """
        runner = self._runner
        takes_over = await runner.admit(split, stream, lifeline, position, early=early)
        self._state.meet(split, stream.consumer, serialized_bytes, counters)
        started = await runner.start(
            split, stream, shuffle, trace, takes_over=takes_over, early=early
        )
        # Who goes on after a restart knows better where to read from.
        if (position and position.fed) or not self._reads(split, stream, started.epoch):
            return started
        distribution = runner.distribution
        delivery = distribution.read(split, None)
        if not (delivery.slices or delivery.end):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if early else FIRST_BLOCKS_S):
                    await distribution.news(split, None if early else runner.waits.tick())
            if not self._reads(split, stream, started.epoch):
                return started
            delivery = distribution.read(split, None)
        if not (delivery.slices or delivery.end):
            return started
        self._state.send(split, delivery)
        return started._replace(delivery=delivery)

    @replies
    async def hold(self, name: str) -> None:
        """Return when the lifeline is released: until then its process's death shows."""
        await self._runner.lifelines.hold(name)

    @replies
    async def release(self, name: str) -> None:
        """Let a lifeline's call of `hold` return."""
        self._runner.lifelines.release(name)

    @replies
    async def report_death(self, split: int, stream: Stream) -> None:
        """Note that a consumer is dead, for those who know it sooner than Ray does."""
        self._runner.bury(split, stream)
        self._runner.lifelines.detach(stream)

    @replies
    async def pull(
        self,
        split: int,
        epoch: int,
        stream: Stream,
        cursor: int | None,
        progress: Progress,
        counters: ConsumerCounters,
        trace: Carrier | None = None,
        rows_ahead: int | None = None,
    ) -> Delivery | Rejoin:
        """Acknowledge progress; return the slices from ``cursor`` on, as soon as there are any.

        Without a cursor they are those from the first row that is not committed. One pull waits
        per split: a newer one sends an older one home with nothing. ``trace`` is the stream's span;
        ``rows_ahead`` how many rows the stream has for whole batches, or below 0 how many the next
        batch lacks: on demand, what is asked for early is given when it is due.
        """
        if trace is None:
            return await self._pull(split, epoch, stream, cursor, progress, counters, rows_ahead)
        with self._spans.pull(split, epoch, trace) as noted:
            answer = await self._pull(split, epoch, stream, cursor, progress, counters, rows_ahead)
            if isinstance(answer, Delivery):
                noted[SLICES] = len(answer.slices)
            return answer

    async def _pull(
        self,
        split: int,
        epoch: int,
        stream: Stream,
        cursor: int | None,
        progress: Progress,
        counters: ConsumerCounters,
        rows_ahead: int | None,
    ) -> Delivery | Rejoin:
        if epoch > self._runner.epochs.epoch:
            self._state.rejoins["coordinator_restarted"] += 1
            return Rejoin()
        self._acknowledge(split, epoch, stream, progress, counters, rows_ahead)
        delivery = self._runner.distribution.read(split, cursor)
        while not (delivery.slices or delivery.end):
            if not await self._runner.distribution.news(split, self._runner.waits.tick()):
                break
            self._runner.check(split, epoch, stream)
            delivery = self._runner.distribution.read(split, cursor)
        self._state.send(split, delivery)
        return delivery

    @replies
    async def acknowledge(
        self,
        split: int,
        epoch: int,
        stream: Stream,
        progress: Progress,
        counters: ConsumerCounters,
        rows_ahead: int | None = None,
    ) -> None:
        """Acknowledge progress between pulls, so that long blocks are committed as they go.

        With ``rows_ahead`` that is all the stream has by now, and its pull is not to wait longer.
        """
        self._acknowledge(split, epoch, stream, progress, counters, rows_ahead)

    @replies
    async def notify_split_finished(
        self, split: int, stream: Stream, progress: Progress | None, counters: ConsumerCounters
    ) -> None:
        """Note that a stream is closed: it ended or was broken off.

        Without ``progress`` it never knew that its epoch had begun.
        """
        self._state.update(split, stream.consumer, counters)
        if progress is not None and self._runner.reads(split, stream):
            self._runner.acknowledge(split, progress)
        self._runner.leave(split, stream, began=progress is not None)
        # Who leaves early, and last, goes on when nothing is produced any more.
        await self._runner.stopped()

    @replies
    async def get_dataset_schema(
        self, during_execution: DuringExecution, trace: Carrier | None = None
    ) -> Schema | None:
        """Return the dataset's schema; see `EpochRunner.schema`. ``trace`` is the caller's span."""
        with self._spans.schema(during_execution, trace):
            return await self._runner.schema(during_execution)

    @replies
    async def get_dataset_context(self) -> DataContext:
        """Return the dataset's own context."""
        return self._context

    @replies
    async def get_dataset_tag(self, split: int) -> dict[str, str]:
        """Name dataset and split, as upstream's iterator metrics do."""
        return {"dataset": self._state.dataset, "split_index": str(split)}

    @replies
    async def stats(self) -> str:
        """Return Ray Data's statistics of the last execution and the coordinator's own."""
        return f"{await self._guard.stats()}\n{summary(self._state)}"

    @replies
    async def status(self) -> Status:
        """Return what the coordinator is doing; answers also while everything else waits."""
        return Status(
            pid=os.getpid(),
            node_id=engine.node_id(),
            epoch=self._runner.epochs.epoch,
            phase=self._runner.epochs.phase.value,
            missing=self._runner.epochs.missing,
            reading=sorted(self._runner.epochs.active),
            executing=self._guard.active,
            held_bytes=sum(each.ledger.held_bytes for each in self._runner.distributions),
            committed_rows=self._runner.distribution.ledger.committed_rows,
            schema_requests=dict(self._state.schema_requests),
        )

    @replies
    async def metrics_url(self) -> str | None:
        """Return where ``/metrics`` is served, or None if it is not."""
        return self._outlets.url

    @replies
    async def shutdown_executor(self) -> None:
        """Stop executing: whoever waits gets `StreamClosedError`, and no epoch starts any more."""
        await self._runner.shut_down()

    def _reads(self, split: int, stream: Stream, epoch: int) -> bool:
        epochs = self._runner.epochs
        alive = stream.consumer not in epochs.dead
        return alive and epochs.epoch == epoch and self._runner.reads(split, stream)

    def _acknowledge(
        self,
        split: int,
        epoch: int,
        stream: Stream,
        progress: Progress,
        counters: ConsumerCounters,
        rows_ahead: int | None,
    ) -> None:
        self._runner.check(split, epoch, stream)
        self._runner.waits.hear(split)
        self._state.update(split, stream.consumer, counters)
        if rows_ahead is not None:
            self._runner.distribution.ask(split, rows_ahead, counters)
        self._runner.acknowledge(split, progress)
