"""EpochRunner: opens the barrier, starts and ends epochs, and looks after those who wait.

Who may start, which split gets a block and who has kept the others waiting for too long is
decided in `asyncsplit.core`; this class carries it out, for `asyncsplit.coordinator`.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ray import ObjectRef

from asyncsplit.core.budget import prefetch_budget
from asyncsplit.core.epochs import Epochs, Noted, Phase, Stream
from asyncsplit.core.ledger import Ledger
from asyncsplit.core.liveness import Liveness, lost_error
from asyncsplit.core.position import FINISHED, Past, Position
from asyncsplit.core.progress import Progress
from asyncsplit.core.readers import reader_name, reader_names
from asyncsplit.core.replay import Replay, read_before
from asyncsplit.core.routing import Equal, make_router
from asyncsplit.core.shuffle import ShuffleKey, shared_key, shared_keys
from asyncsplit.distribution import Distribution
from asyncsplit.errors import ConsumerConflictError, StaleEpochError, StreamClosedError
from asyncsplit.guard import Guard
from asyncsplit.journal import Journal
from asyncsplit.lifeline import Lifelines
from asyncsplit.options import SplitOptions
from asyncsplit.telemetry.epoch_spans import EpochSpans
from asyncsplit.telemetry.state import CoordinatorState
from asyncsplit.telemetry.tracing import Carrier
from asyncsplit.wire import Failure, Started

T = TypeVar("T")

logger = logging.getLogger(__name__)

TICK_S = 1.0
"""How often waits are looked after."""


class _Next(NamedTuple):
    """An epoch that is started before its barrier opens."""

    distribution: Distribution
    starting: "asyncio.Task[None]"


class EpochRunner:
    """The epochs of one dataset's splits: the one under way, and the barrier of the next."""

    def __init__(
        self,
        n: int,
        *,
        equal: Equal,
        hints: Sequence[str] | None,
        keeps_order: bool,
        options: SplitOptions,
        guard: Guard,
        state: CoordinatorState,
        journal: Journal,
        spans: EpochSpans,
    ) -> None:
        """Set up; nothing runs until all splits have arrived."""
        self._n = n
        self._replicas = options.replicas
        self._equal: Equal = equal
        self._hints = hints
        self._keeps_order = keeps_order
        self._options = options
        self._budget = prefetch_budget(options.prefetch_bytes, n, None)
        # What is given on demand is asked for when the last of it is begun.
        self._on_demand = options.routing == "demand"
        self._prefetch_bytes = 1 if self._on_demand else self._budget
        self._guard = guard
        self._state = state
        self._journal = journal
        self._spans = spans
        self.epochs = Epochs(n * options.replicas, replicas=options.replicas)
        if (noted := journal.read()) is not None:
            self.epochs.recover(noted)
        self._noted = self.epochs.noted
        self.distribution: Distribution
        """The blocks of the epoch under way."""
        self.distribution = self._new_distribution(first=True)
        self._failed: tuple[int, Failure, Collection[Stream]] | None = None
        self.lifelines = Lifelines()
        self._stopping: asyncio.Task[None] | None = None
        self._next: _Next | None = None
        self._openings: dict[int, asyncio.Future[Started]] = {}
        self._shuffles: dict[int, ShuffleKey | None] = {}
        self._keys: dict[int, ShuffleKey | None] = {}
        self._earlier: tuple[tuple[Past, ...], ...] = ()
        self._started: dict[int, Started] = {}
        self._arrived_at: dict[int, float] = {}
        self._liveness = Liveness(
            options.barrier_timeout_s, options.rejoin_timeout_s, options.replicas
        )
        state.watch(self.epochs, self._liveness, self._arrived_at)
        self._ticking = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shut = False

    async def admit(
        self, split: int, stream: Stream, lifeline: "ObjectRef[Any]", position: Position | None
    ) -> bool:
        """Let a stream in, once it is known whether the one that holds its split is dead.

        Returns:
            Whether it takes the place of one that died in the epoch under way.

        Raises:
            StreamClosedError: If it was closed, has died, or the split was shut down.
            Exception: As `Epochs.arrive`; or what the epoch failed with that it had arrived for.
        """
        # Also of a stream that is refused: should it die now, its parked call must return.
        bury = functools.partial(self.bury, split, stream)
        died = self._spawn(self.lifelines.watch(stream, lifeline, bury))
        await self.lifelines.verdict(self.epochs, split, stream)
        if self._shut:
            raise _shut_down()
        if died.done() and died.result():
            raise StreamClosedError("the stream's consumer died")
        if self._failed is not None and stream in self._failed[2]:
            raise self._failed[1].unpack()
        # After the wait: calls that have waited for the same verdict go on one after the other.
        if (earlier := self.epochs.superseded_by(split, stream)) is not None:
            # It has told its consumer of the epoch, or it has not: that shows where it now stands.
            knew = position is not None and position.epoch > self.epochs.epoch
            self.leave(split, earlier, began=knew)
        try:
            takes_over = self.epochs.arrive(split, stream, position)
        except ConsumerConflictError:
            self._state.conflicts += 1
            raise
        self.hear(split)
        return takes_over

    async def start(
        self,
        split: int,
        stream: Stream,
        shuffle: ShuffleKey | None,
        trace: Carrier | None,
        *,
        takes_over: bool,
    ) -> Started:
        """Return when the epoch has started that a stream was let in for."""
        if self.reads(split, stream):
            if takes_over:
                if self._replicas > 1:  # before anything changes: who is refused leaves the place
                    shared_key(split // self._replicas, (), (self._keys[split], shuffle))
                self._state.replace(split)
                self._spans.replaced(split, trace)
                self.distribution.take_over(split, shuffle)
                self._started[split] = self._start_at(split)
                self._journal.take_over(split, stream, self._position(split))
            return self._started[split]
        if takes_over:
            self.distribution.ledger.rewind(split, shuffle)
        if split not in self._openings or self._openings[split].done():
            self._openings[split] = asyncio.get_running_loop().create_future()
            self._arrived_at[split] = self.tick()
            self._state.arrivals += 1
            self._spans.arrived(split, trace)
        self._shuffles[split] = shuffle
        opening = self._openings[split]
        self._open_if_ready()
        return await asyncio.shield(opening)

    def reads(self, split: int, stream: Stream) -> bool:
        """Tell whether a stream reads the epoch under way."""
        return self.epochs.phase is Phase.RUNNING and self.epochs.active.get(split) == stream

    def hear(self, split: int) -> None:
        """Note a message from a split's consumer: it lives."""
        self._liveness.hear(split, self.tick())

    async def shut_down(self) -> None:
        """Stop executing: whoever waits gets `StreamClosedError`, and no epoch starts any more."""
        self._shut = True
        self._give_up(_shut_down())
        await self.stopped()
        await self._guard.stop(self._drop_next())

    async def stopped(self) -> None:
        """Return when nothing is produced any more of an epoch that was given up."""
        if self._stopping is not None:
            await asyncio.shield(self._stopping)

    @property
    def distributions(self) -> list[Distribution]:
        """The epoch's that is under way, and the next one's if it was started."""
        return [self.distribution, *([self._next.distribution] if self._next else ())]

    def _open_if_ready(self) -> None:
        if self.epochs.noted is not self._noted:
            self._noted = self.epochs.noted
            self._journal.begin(self._noted or Noted(self.epochs.epoch, {}, {}))
        if self.epochs.ready and not self._shut:
            resume = self.epochs.open()
            self._noted = None
            self._state.epoch_opened()
            self._spans.opened(self.epochs.epoch, self.epochs.active)
            self._spawn(self._run_epoch(self.epochs.epoch, resume))

    async def _run_epoch(self, epoch: int, resume: Mapping[int, Position]) -> None:
        """Start the executor for an epoch whose barrier has opened, and let everybody in."""
        openings = {split: self._openings[split] for split in self.epochs.active}
        prepared, self._next = self._next, None
        resume = {
            split: position if position.saved else position.under(self._shuffles.get(split))
            for split, position in resume.items()
        }
        distribution = prepared.distribution if prepared else self._new_distribution(resume)
        self.distribution = distribution
        keys: dict[int, ShuffleKey | None] = {}
        try:
            repeatable = self._keeps_order and self._options.routing == "rows"
            self._earlier = read_before(
                resume, self._n, epoch, repeatable=repeatable, replicas=self._replicas
            )
            distribution.replay(Replay(splits, equal=self._equal) for splits in self._earlier)
            await (prepared.starting if prepared else self._start(distribution, epoch))
            asked = {reader: self._shuffles[reader] for reader in self.epochs.active}
            begun = {reader: position.shuffle for reader, position in resume.items()}
            keys = shared_keys(self._replicas, asked, begun)
        except Exception as error:  # the consumers get it, whatever it is
            distribution.error = distribution.error or error
        if distribution.error is not None:
            for opening in openings.values():
                _reject(opening, distribution.error)
            if self._is_starting(epoch):
                self._fail(distribution.error)
            return
        if not self._is_starting(epoch):
            return  # given up meanwhile: the guard stops the executor next
        self._keys = keys
        self.epochs.started()
        self._state.epoch_started()
        finished = {split for split, position in resume.items() if position.rows == FINISHED}
        for split in set(range(self.epochs.n)) - {*self.epochs.active, *finished}:
            distribution.ledger.leave(split)  # closed while the executor was starting
        for split in self.epochs.active:
            if split not in resume or not resume[split].rows:
                distribution.ledger.logs[split].shuffle = self._keys[split]
            self._started[split] = self._start_at(split)
        self._journal.begin(
            Noted(
                epoch,
                dict(self.epochs.active),
                {split: self._position(split) for split in self.epochs.active},
            )
        )
        for split in self.epochs.active:
            # Not as they were before the start: who replaced a dead one may have its own.
            if not self._openings[split].done():
                self._openings[split].set_result(self._started[split])
        if distribution.ledger.finished:
            self._start_next()
        self._end_if_all_left()

    def _start_at(self, split: int) -> Started:
        trace = self._spans.carrier
        return Started(
            self._position(split), self._prefetch_bytes, trace=trace, on_demand=self._on_demand
        )

    def _position(self, split: int) -> Position:
        position = self.distribution.ledger.logs[split].position
        return position._replace(epoch=self.epochs.epoch, earlier=self._earlier)

    async def _start(self, distribution: Distribution, epoch: int) -> None:
        """Start the executor for an epoch; what keeps it from starting is noted as its error."""
        self._spans.executor_starts(epoch)
        try:
            execution = await self._guard.start(epoch)
        except Exception as error:  # the consumers get it, whatever it is
            distribution.error = self._guard.failure(error)
        else:
            distribution.start(execution, f"asyncsplit-pump-{epoch}", self._state.pump)
        self._spans.executor_started(epoch, distribution.error)

    def _start_next(self) -> None:
        """Start the next epoch before all have arrived, if it is known that there is one."""
        epoch = self.epochs.epoch + 1
        if self._next is None and not self._shut and epoch < (self._options.epochs or 0):
            distribution = self._new_distribution()
            self._next = _Next(distribution, self._spawn(self._start(distribution, epoch)))

    def _drop_next(self) -> Callable[[], None]:
        """Give up an epoch started before its time; return what blocks until its thread ends."""
        dropped, self._next = self._next, None
        return dropped.distribution.stop() if dropped else lambda: None

    def _distribution_ended(self, distribution: Distribution) -> None:
        """Start the next epoch, or fail; of one started ahead, that is seen to when it begins."""
        if distribution is not self.distribution:
            return
        if distribution.error is not None:
            self._fail(distribution.error)
        elif self.epochs.phase is Phase.RUNNING:
            self._start_next()

    def _is_starting(self, epoch: int) -> bool:
        return epoch == self.epochs.epoch and self.epochs.phase is Phase.STARTING

    def check(self, split: int, epoch: int, stream: Stream) -> None:
        """Raise what an epoch failed with, or unless the stream reads it; see `Epochs.check`."""
        if self._failed is not None and self._failed[0] == epoch:
            raise self._failed[1].unpack()
        try:
            self.epochs.check(split, epoch, stream)
        except (ConsumerConflictError, StaleEpochError):
            self._state.fenced += 1
            raise

    def bury(self, split: int, stream: Stream) -> None:
        """Keep a dead consumer's place in the epoch for whoever replaces it."""
        self.epochs.dead[stream.consumer] = None
        holder = self.epochs.holder(split)
        if holder is None or holder.consumer != stream.consumer:
            return
        stream = holder  # a process dies with all its streams
        if self.epochs.arrived.get(split) == stream:
            _reject(self._openings[split], StreamClosedError("the stream's consumer died"))
        if self.epochs.die(split, stream):
            self._liveness.mourn(split, self.tick())
            self._state.deaths += 1
            self._spans.died(split)
            logger.warning(
                "the consumer of %s died in epoch %d; another one that iterates the split"
                " goes on from its first uncommitted row",
                reader_name(split, self._replicas),
                self.epochs.epoch,
            )

    def tick(self) -> float:
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
        if not (self.epochs.active or self.epochs.arrived or self._next):
            return
        now = self.tick()
        if self.distributions[-1].paused:
            self._guard.excuse_pause()
        barrier = [self._arrived_at[split] for split in self.epochs.arrived]
        pulls = self.distribution.waiting_since
        blockers = set(self.epochs.missing if barrier else ())
        if pulls and self.epochs.phase is Phase.RUNNING:
            blockers.update(self.distribution.ledger.blockers())
        elif not barrier and all(map(self._liveness.is_dead, self.epochs.active)):
            blockers.update(self.epochs.active)
        since = min((*barrier, *pulls.values()), default=now) if blockers else None
        if since is None:
            return
        if lost := self._liveness.lost(blockers, since, now):
            self._lose(lost)
        elif warning := self._liveness.warning(blockers, since, now):
            logger.warning(
                "%s wait in epoch %d: %s. They give up after barrier_timeout_s=%s, or"
                " rejoin_timeout_s=%s for a dead consumer",
                reader_names({*self.epochs.arrived, *pulls}, self._replicas),
                self.epochs.epoch + bool(barrier),
                warning,
                self._options.barrier_timeout_s,
                self._options.rejoin_timeout_s,
            )

    def _lose(self, lost: dict[int, str]) -> None:
        """Tell all who wait that a consumer is lost; a fresh epoch starts when all arrive."""
        self._state.lost += len(lost)
        waits_for = self.epochs.epoch + bool(self.epochs.arrived)
        self._give_up(lost_error(waits_for, lost, self._replicas))

    def _give_up(self, error: BaseException) -> None:
        """End the epoch under way, and the wait for the next one, for everybody with an error."""
        self._spans.gave_up(self.epochs.epoch + 1, self.epochs.arrived, error)
        if (noted := self.epochs.abandon()) is not None:
            self._failed = (noted.epoch, Failure.of(error), tuple(noted.readers.values()))
        for split, stream in tuple(self.epochs.arrived.items()):
            self.epochs.leave(split, stream)
            self.lifelines.release(stream)
            _reject(self._openings[split], error)
        self._fail(error)

    def acknowledge(self, split: int, progress: Progress) -> None:
        """Commit what the stream that reads a split has finished with."""
        self.distribution.acknowledge(split, progress)
        if self.epochs.phase is Phase.RUNNING:
            self._journal.commit(split, self._position(split))

    def leave(self, split: int, stream: Stream, *, began: bool) -> None:
        """Let a stream go, and end the epoch when it was the last.

        ``began`` says whether it knows that its epoch has begun. If it does not, its place in that
        is kept; and so is that of one thought dead, which has lost it to whoever replaces it.
        """
        if stream.consumer in self.epochs.dead and not self.distribution.is_through(split):
            began = False
        self.lifelines.release(stream)
        opening = self._openings.get(split)
        waited = self.epochs.arrived.get(split) == stream
        if not began and self.epochs.vacate(split, stream):
            self._liveness.mourn(split, self.tick(), "left as the epoch began,")
            if opening is not None:
                _reject(opening, _left())
            return
        running = began and self.epochs.leave(split, stream)
        if waited or running:
            self._liveness.forget(split)
        if (waited or running) and opening is not None:
            _reject(opening, _left())
        if running and self.epochs.phase is Phase.RUNNING:
            self._journal.leave(split)
            self.distribution.leave(split)
            self._end_if_all_left()
        self._open_if_ready()

    def _end_if_all_left(self) -> None:
        if self.epochs.phase is Phase.RUNNING and not self.epochs.active:
            self._end_epoch("completed" if self.distribution.ledger.finished else "stopped")

    def _fail(self, error: BaseException) -> None:
        """End the epoch under way for everybody with an error."""
        if self.epochs.phase is Phase.STARTING:
            for split in self.epochs.active:
                _reject(self._openings[split], error)
        if self.epochs.phase is not Phase.WAITING:
            streams = tuple(self.epochs.active.values())
            self._failed = (self.epochs.epoch, Failure.of(error), streams)
            self._end_epoch("failed", error)

    def _end_epoch(self, outcome: str, error: BaseException | None = None) -> None:
        """Let the blocks go, stop the executor, and begin the next epoch if all wait for it."""
        self._state.epoch_ended(outcome)
        self._spans.ended(outcome, self.distribution.ledger, error)
        for split, stream in self.epochs.active.items():
            self.lifelines.release(stream)
            self._liveness.forget(split)
        self.epochs.over()
        self._journal.begin(Noted(self.epochs.epoch, {}, {}))
        join = self.distribution.stop()
        self.distribution = self._new_distribution()
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

    def _new_distribution(
        self, resume: Mapping[int, Position] | None = None, *, first: bool = False
    ) -> Distribution:
        router = make_router(
            self._n, equal=self._equal, routing=self._options.routing, hints=self._hints
        )
        if not first:
            router.go_on_from(self.distribution.ledger.router)
        ledger = Ledger(self._n, router, self._budget, resume, self._replicas)
        return Distribution(ledger, self._guard, self._distribution_ended)


def _reject(opening: "asyncio.Future[Started]", error: BaseException) -> None:
    if not opening.done():
        opening.set_exception(error)
        opening.exception()  # the consumer may have left: that nobody looks is no news


def _left() -> StreamClosedError:
    return StreamClosedError("the stream was closed before its epoch began")


def _shut_down() -> StreamClosedError:
    return StreamClosedError("the split was shut down; create a new one to iterate again")
