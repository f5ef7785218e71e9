"""SplitCoordinator: the async Ray actor that owns a dataset's execution and its splits.

A thin shell: who may start, which split gets a block and what is acknowledged is decided in
`asyncsplit.core`; this class waits, carries and answers. Every method is ``async def`` and none
blocks: Ray Data's blocking calls run on one thread of their own (`asyncsplit.guard`), taking
blocks on another (`asyncsplit.pump`).
"""

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from ray import ObjectRef
from ray.data import DataContext, Dataset, Schema

from asyncsplit import engine
from asyncsplit.core.epochs import Epochs, Phase, Stream
from asyncsplit.core.ledger import FINISHED, Ledger, Past, Position
from asyncsplit.core.liveness import Liveness, listing
from asyncsplit.core.progress import Progress
from asyncsplit.core.replay import Replay, read_before
from asyncsplit.core.routing import make_router
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.distribution import Distribution
from asyncsplit.errors import (
    ConsumerConflictError,
    ConsumerLostError,
    StaleEpochError,
    StreamClosedError,
)
from asyncsplit.guard import DuringExecution, Guard
from asyncsplit.lifeline import VERDICT_S, Lifelines
from asyncsplit.options import SplitOptions
from asyncsplit.parcel import unpack
from asyncsplit.telemetry.outlets import Outlets
from asyncsplit.telemetry.state import ConsumerCounters, CoordinatorState
from asyncsplit.telemetry.summary import summary
from asyncsplit.wire import Delivery, Failure, Rejoin, Started, Status, replies

T = TypeVar("T")

logger = logging.getLogger(__name__)

TICK_S = 1.0
"""How often waits are looked after."""


def _reject(opening: "asyncio.Future[Started]", error: BaseException) -> None:
    if not opening.done():
        opening.set_exception(error)
        opening.exception()  # the consumer may have left: that nobody looks is no news


class _Next(NamedTuple):
    """An epoch that is started before its barrier opens."""

    distribution: Distribution
    starting: "asyncio.Task[None]"


class SplitCoordinator:
    """Coordinates the consumers of one dataset's splits."""

    def __init__(
        self,
        n: int,
        equal: bool,
        locality_hints: Sequence[str] | None,
        options: SplitOptions,
        *pieces: bytes,
    ) -> None:
        """Put the dataset together and set up; nothing runs until all splits have arrived."""
        dataset: Dataset = unpack(pieces)
        self._n = n
        self._equal = equal
        # Ray Data ignores locality where order must be kept; so do we, or the same blocks would
        # not be routed the same way twice.
        self._keeps_order = dataset.context.execution_options.preserve_order
        self._hints = None if self._keeps_order else locality_hints
        self._options = options
        # What is given on demand is asked for one block at a time, when the last one is begun.
        self._prefetch_bytes = 1 if options.routing == "demand" else options.prefetch_bytes
        self._context = dataset.context.copy()
        engine.use_context(self._context)
        self._state = CoordinatorState.of(
            engine.dataset_tag(dataset), n, dataset.name, lambda: self._distribution
        )
        blocking = ThreadPoolExecutor(1, thread_name_prefix="asyncsplit-blocking")
        self._guard = Guard(dataset, blocking, self._state)
        self._epochs = Epochs(n)
        self._distribution = self._new_distribution()
        self._next: _Next | None = None
        self._openings: dict[int, asyncio.Future[Started]] = {}
        self._shuffles: dict[int, ShuffleKey | None] = {}
        self._earlier: tuple[tuple[Past, ...], ...] = ()
        self._failed: tuple[int, Failure, Collection[Stream]] | None = None
        self._liveness = Liveness(options.barrier_timeout_s, options.rejoin_timeout_s)
        self._lifelines = Lifelines()
        self._started: dict[int, Started] = {}
        self._arrived_at: dict[int, float] = {}
        self._state.watch(self._epochs, self._liveness, self._arrived_at)
        self._ticking = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping: asyncio.Task[None] | None = None
        self._shut = False
        self._outlets = Outlets(self._state, options.telemetry)
        self._kept: Sequence[ObjectRef[Any]] = ()

    def __ray_shutdown__(self) -> None:
        """Stop executing before the process ends: Ray calls this when it lets the actor go.

        Threads still at work when Ray's own part of the process is taken down can corrupt its
        memory, and leave behind a process that writes one stack trace after the other.
        """
        joins = [distribution.stop() for distribution in self._distributions]
        self._guard.close()
        for join in joins:
            join()
        self._outlets.close()

    async def keep(self, refs: "Sequence[ObjectRef[Any]]") -> None:
        """Keep what the dataset refers to, as long as this process lives."""
        self._kept = refs

    @replies
    async def start_epoch(
        self,
        split: int,
        stream: Stream,
        lifeline: Sequence["ObjectRef[Any]"],
        position: Position | None,
        shuffle: ShuffleKey | None,
        serialized_bytes: int,
        counters: ConsumerCounters,
    ) -> Started:
        """Arrive at the barrier; return when the next epoch has started.

        Whoever comes for a split whose consumer has died in the middle of an epoch does not wait:
        it takes that epoch over, from the first row that is not committed.

        ``lifeline`` holds the reference to the consumer's call of `hold`; ``position`` is where
        it stands, if it has read the split before; ``shuffle`` what its order is drawn from;
        ``serialized_bytes`` is the pickled size of its iterator, 0 if it never was.
        """
        stream = Stream(*stream)
        # Also of a stream that is refused: should it die now, its parked call must return.
        bury = functools.partial(self._bury, split, stream)
        died = self._spawn(self._lifelines.watch(stream, lifeline[0], bury))
        await self._wait_for_verdict(split, stream)
        self._check_open()
        if died.done() and died.result():
            raise StreamClosedError("the stream's consumer died")
        if self._failed is not None and stream in self._failed[2]:
            raise self._failed[1].unpack()
        # After the wait: calls that have waited for the same verdict go on one after the other.
        if (earlier := self._epochs.superseded_by(split, stream)) is not None:
            self._leave(split, earlier)
        try:
            takes_over = self._epochs.arrive(split, stream, position and Position(*position))
        except ConsumerConflictError:
            self._state.conflicts += 1
            raise
        now = self._tick()
        self._liveness.hear(split, now)
        self._state.meet(split, stream.consumer, serialized_bytes, counters)
        if self._epochs.phase is Phase.RUNNING and self._epochs.active.get(split) == stream:
            if takes_over:
                self._state.replace(split)
                self._started[split] = self._take_over(split, shuffle)
            return self._started[split]
        if takes_over:
            self._distribution.ledger.logs[split].forget_begun()
        if split not in self._openings or self._openings[split].done():
            self._openings[split] = asyncio.get_running_loop().create_future()
            self._arrived_at[split] = now
            self._state.arrivals += 1
        self._shuffles[split] = shuffle
        opening = self._openings[split]
        self._open_if_ready()
        return await asyncio.shield(opening)

    @replies
    async def hold(self, split: int, stream: Stream) -> None:
        """Return when the stream is closed: until then its owner's death shows."""
        stream = Stream(*stream)
        if not (self._epochs.is_closed(split, stream) or stream.consumer in self._epochs.dead):
            await self._lifelines.hold(stream)

    @replies
    async def report_death(self, split: int, stream: Stream) -> None:
        """Note that a consumer is dead, for those who know it sooner than Ray does."""
        stream = Stream(*stream)
        self._bury(split, stream)
        self._lifelines.release(stream)

    @replies
    async def pull(
        self,
        split: int,
        epoch: int,
        stream: Stream,
        cursor: int | None,
        progress: Progress,
        counters: ConsumerCounters,
    ) -> Delivery | Rejoin:
        """Acknowledge progress; return the slices from ``cursor`` on, as soon as there are any.

        Without a cursor they are those from the first row that is not committed. One pull waits
        per split: a newer one sends an older one home with nothing.
        """
        stream = Stream(*stream)
        if epoch > self._epochs.epoch:
            self._state.rejoins["coordinator_restarted"] += 1
            return Rejoin()
        self._acknowledge(split, epoch, stream, progress, counters)
        delivery = self._distribution.read(split, cursor)
        while not (delivery.slices or delivery.end):
            if not await self._distribution.news(split, self._tick()):
                break
            self._check_stream(split, epoch, stream)
            delivery = self._distribution.read(split, cursor)
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
    ) -> None:
        """Acknowledge progress between pulls, so that long blocks are committed as they go."""
        self._acknowledge(split, epoch, Stream(*stream), progress, counters)

    @replies
    async def notify_split_finished(
        self, split: int, stream: Stream, progress: Progress, counters: ConsumerCounters
    ) -> None:
        """Note that a stream is closed: it ended, was broken off, or never got its epoch."""
        stream = Stream(*stream)
        self._state.update(split, stream.consumer, counters)
        if self._epochs.active.get(split) == stream and self._epochs.phase is Phase.RUNNING:
            self._distribution.acknowledge(split, Progress(*progress))
        self._leave(split, stream)
        if self._stopping is not None:
            # Who leaves early, and last, goes on when nothing is produced any more.
            await asyncio.shield(self._stopping)

    @replies
    async def get_dataset_schema(self, during_execution: DuringExecution) -> Schema | None:
        """Return the dataset's schema; see `Guard.schema`."""
        return await self._guard.schema(during_execution)

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
            epoch=self._epochs.epoch,
            phase=self._epochs.phase.value,
            missing=self._epochs.missing,
            reading=sorted(self._epochs.active),
            executing=self._guard.active,
            held_bytes=sum(each.ledger.held_bytes for each in self._distributions),
            committed_rows=[log.committed_rows for log in self._distribution.ledger.logs],
            schema_requests=dict(self._state.schema_requests),
        )

    @replies
    async def metrics_url(self) -> str | None:
        """Return where ``/metrics`` is served, or None if it is not."""
        return self._outlets.url

    @replies
    async def shutdown_executor(self) -> None:
        """Stop executing: whoever waits gets `StreamClosedError`, and no epoch starts any more."""
        self._shut = True
        closed = StreamClosedError("the split was shut down; create a new one to iterate again")
        self._fail(closed)
        for split, stream in tuple(self._epochs.arrived.items()):
            self._epochs.leave(split, stream)
        for opening in self._openings.values():
            _reject(opening, closed)
        if self._stopping is not None:
            await asyncio.shield(self._stopping)
        await self._guard.stop(self._drop_next())

    @property
    def _distributions(self) -> list[Distribution]:
        """The epoch's that is under way, and the next one's if it was started."""
        return [self._distribution, *([self._next.distribution] if self._next else ())]

    def _check_open(self) -> None:
        if self._shut:
            raise StreamClosedError("the split was shut down; create a new one to iterate again")

    def _open_if_ready(self) -> None:
        if self._epochs.ready and not self._shut:
            resume = self._epochs.open()
            self._state.epoch_opened()
            self._spawn(self._run_epoch(self._epochs.epoch, resume))

    async def _run_epoch(self, epoch: int, resume: Mapping[int, Position]) -> None:
        """Start the executor for an epoch whose barrier has opened, and let everybody in."""
        openings = {split: self._openings[split] for split in self._epochs.active}
        prepared, self._next = self._next, None
        distribution = prepared.distribution if prepared else self._new_distribution(resume)
        self._distribution = distribution
        try:
            repeatable = self._keeps_order and self._options.routing == "rows"
            self._earlier = read_before(resume, self._n, epoch, repeatable=repeatable)
        except Exception as error:  # the consumers get it, whatever it is
            distribution.error = error
        else:
            distribution.replay(Replay(splits, equal=self._equal) for splits in self._earlier)
            await (prepared.starting if prepared else self._start(distribution, epoch))
        if distribution.error is not None:
            for opening in openings.values():
                _reject(opening, distribution.error)
            if self._is_starting(epoch):
                self._fail(distribution.error)
            return
        if not self._is_starting(epoch):
            return  # given up meanwhile: the guard stops the executor next
        self._epochs.started()
        self._state.epoch_started()
        finished = {split for split, position in resume.items() if position.rows == FINISHED}
        for split in set(range(self._n)) - {*self._epochs.active, *finished}:
            distribution.ledger.leave(split)  # closed while the executor was starting
        for split in openings:
            position = resume.get(split, Position(epoch))
            if not position.rows:
                distribution.ledger.logs[split].shuffle = self._shuffles[split]
            self._started[split] = Started(
                epoch, self._prefetch_bytes, position.rows, position.shuffle, self._earlier
            )
        for split in self._epochs.active:
            # Not as they were before the start: who replaced a dead one may have its own.
            if not self._openings[split].done():
                self._openings[split].set_result(self._started[split])
        if distribution.ledger.finished:
            self._start_next()
        self._end_if_all_left()

    async def _start(self, distribution: Distribution, epoch: int) -> None:
        """Start the executor for an epoch; what keeps it from starting is noted as its error."""
        try:
            execution = await self._guard.start(epoch)
        except Exception as error:  # the consumers get it, whatever it is
            distribution.error = engine.unwrap(error)
        else:
            distribution.start(execution, f"asyncsplit-pump-{epoch}", self._state.pump)

    def _start_next(self) -> None:
        """Start the next epoch before all have arrived, if it is known that there is one."""
        epoch = self._epochs.epoch + 1
        if self._next is None and not self._shut and epoch < (self._options.epochs or 0):
            distribution = self._new_distribution()
            self._next = _Next(distribution, self._spawn(self._start(distribution, epoch)))

    def _drop_next(self) -> Callable[[], None]:
        """Give up an epoch started before its time; return what blocks until its thread ends."""
        dropped, self._next = self._next, None
        return dropped.distribution.stop() if dropped else lambda: None

    def _distribution_ended(self, distribution: Distribution) -> None:
        """Start the next epoch, or fail; of one started ahead, that is seen to when it begins."""
        if distribution is not self._distribution:
            return
        if distribution.error is not None:
            self._fail(distribution.error)
        elif self._epochs.phase is Phase.RUNNING:
            self._start_next()

    def _is_starting(self, epoch: int) -> bool:
        return epoch == self._epochs.epoch and self._epochs.phase is Phase.STARTING

    def _acknowledge(
        self,
        split: int,
        epoch: int,
        stream: Stream,
        progress: Progress,
        counters: ConsumerCounters,
    ) -> None:
        self._check_stream(split, epoch, stream)
        self._liveness.hear(split, self._tick())
        self._state.update(split, stream.consumer, counters)
        self._distribution.acknowledge(split, Progress(*progress))

    def _check_stream(self, split: int, epoch: int, stream: Stream) -> None:
        if self._failed is not None and self._failed[0] == epoch:
            raise self._failed[1].unpack()
        try:
            self._epochs.check(split, epoch, stream)
        except (ConsumerConflictError, StaleEpochError):
            self._state.fenced += 1
            raise

    async def _wait_for_verdict(self, split: int, stream: Stream) -> None:
        """Give the news that a split's consumer has died the time it takes to come.

        A replacement may be quicker than that; an intruder is not made faster by a wait.
        """
        now = asyncio.get_running_loop().time
        until = {stream.consumer: now()}
        while (holder := self._epochs.holder(split)) and holder.consumer not in self._epochs.dead:
            # While this one waits, another one may be let in that has died since.
            if until.setdefault(holder.consumer, now() + VERDICT_S) <= now():
                return
            await self._lifelines.news(holder, until[holder.consumer])

    def _bury(self, split: int, stream: Stream) -> None:
        """Keep a dead consumer's place in the epoch for whoever replaces it."""
        self._epochs.dead[stream.consumer] = None
        holder = self._epochs.holder(split)
        if holder is None or holder.consumer != stream.consumer:
            return
        stream = holder  # a process dies with all its streams
        if self._epochs.arrived.get(split) == stream:
            _reject(self._openings[split], StreamClosedError("the stream's consumer died"))
        if self._epochs.die(split, stream):
            self._liveness.mourn(split, self._tick())
            self._state.deaths += 1
            logger.warning(
                "the consumer of split %d died in epoch %d; another one that iterates the split"
                " goes on from its first uncommitted row",
                split,
                self._epochs.epoch,
            )

    def _take_over(self, split: int, shuffle: ShuffleKey | None) -> Started:
        """Let a new consumer go on where one died."""
        log = self._distribution.take_over(split, shuffle)
        return Started(
            self._epochs.epoch,
            self._prefetch_bytes,
            log.begin_row,
            log.shuffle,
            self._earlier,
        )

    def _tick(self) -> float:
        """Return the time, and see to it that waits are looked after once a second."""
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(TICK_S, self._look_after_waits)
            self._state.tick_in(TICK_S)
        return time.monotonic()

    def _look_after_waits(self) -> None:
        """Warn of waits that take long, and end those that have taken too long."""
        self._ticking = False
        self._state.ticked()
        if not (self._epochs.active or self._epochs.arrived or self._next):
            return
        now = self._tick()
        if self._distributions[-1].paused:
            self._guard.excuse_pause()
        barrier = [self._arrived_at[split] for split in self._epochs.arrived]
        pulls = self._distribution.waiting_since
        blockers = set(self._epochs.missing if barrier else ())
        if pulls and self._epochs.phase is Phase.RUNNING:
            blockers.update(self._distribution.ledger.blockers())
        elif not barrier and all(map(self._liveness.is_dead, self._epochs.active)):
            blockers.update(self._epochs.active)
        since = min((*barrier, *pulls.values()), default=now) if blockers else None
        if since is None:
            return
        if lost := self._liveness.lost(blockers, since, now):
            self._lose(lost)
        elif warning := self._liveness.warning(blockers, since, now):
            logger.warning(
                "splits %s wait in epoch %d: %s. They give up after barrier_timeout_s=%s, or"
                " rejoin_timeout_s=%s for a dead consumer",
                sorted({*self._epochs.arrived, *pulls}),
                self._epochs.epoch,
                warning,
                self._options.barrier_timeout_s,
                self._options.rejoin_timeout_s,
            )

    def _lose(self, lost: dict[int, str]) -> None:
        """Tell all who wait that a consumer is lost; a fresh epoch starts when all arrive."""
        self._state.lost += len(lost)
        waits_for = self._epochs.epoch + bool(self._epochs.arrived)
        error = ConsumerLostError(
            f"epoch {waits_for} cannot go on: {listing(lost)}. Restart the workers of these"
            " splits and iterate again; raise SplitOptions.barrier_timeout_s if loops pause for"
            " longer than that, or SplitOptions.rejoin_timeout_s if replacing a worker takes longer"
        )
        for split, stream in tuple(self._epochs.arrived.items()):
            self._epochs.leave(split, stream)
            self._lifelines.release(stream)
            _reject(self._openings[split], error)
        self._fail(error)

    def _leave(self, split: int, stream: Stream) -> None:
        """Let a stream go, and end the epoch when it was the last."""
        self._lifelines.release(stream)
        opening = self._openings.get(split)
        waited = self._epochs.arrived.get(split) == stream
        running = self._epochs.leave(split, stream)
        if waited or running:
            self._liveness.forget(split)
        if (waited or running) and opening is not None:
            _reject(opening, StreamClosedError("the stream was closed before its epoch began"))
        if running and self._epochs.phase is Phase.RUNNING:
            self._distribution.leave(split)
            self._end_if_all_left()

    def _end_if_all_left(self) -> None:
        if self._epochs.phase is Phase.RUNNING and not self._epochs.active:
            self._end_epoch("completed" if self._distribution.ledger.finished else "stopped")

    def _fail(self, error: BaseException) -> None:
        """End the epoch under way for everybody with an error."""
        if self._epochs.phase is Phase.STARTING:
            for split in self._epochs.active:
                _reject(self._openings[split], error)
        if self._epochs.phase is not Phase.WAITING:
            streams = tuple(self._epochs.active.values())
            self._failed = (self._epochs.epoch, Failure.of(error), streams)
            self._end_epoch("failed")

    def _end_epoch(self, outcome: str) -> None:
        """Let the blocks go, stop the executor, and begin the next epoch if all wait for it."""
        self._state.epoch_ended(outcome)
        for split, stream in self._epochs.active.items():
            self._lifelines.release(stream)
            self._liveness.forget(split)
        self._epochs.over()
        join = self._distribution.stop()
        self._distribution = self._new_distribution()
        self._stopping = None
        if outcome != "completed":
            self._stopping = self._spawn(self._guard.stop(join, self._drop_next()))
        elif self._next is None:
            self._spawn(self._guard.stop(join))
        self._open_if_ready()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _new_distribution(self, resume: Mapping[int, Position] | None = None) -> Distribution:
        router = make_router(
            self._n, equal=self._equal, routing=self._options.routing, hints=self._hints
        )
        ledger = Ledger(self._n, router, self._options.prefetch_bytes, resume)
        return Distribution(ledger, self._guard, self._distribution_ended)
