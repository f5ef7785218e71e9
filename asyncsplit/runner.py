"""EpochRunner: opens the barrier, starts and ends epochs, and looks after those who wait.

Who may start, which split gets a block and who has kept the others waiting for too long is
decided in `asyncsplit.core`; this class carries it out, for `asyncsplit.coordinator`.
"""

import asyncio
import functools
from collections.abc import Collection, Coroutine, Mapping
from typing import Any, TypeVar

from ray.data import Schema

from asyncsplit import openings
from asyncsplit.ahead import Ahead, Prepared
from asyncsplit.core.epochs import Epochs, Noted, Phase, Stream
from asyncsplit.core.liveness import lost_error
from asyncsplit.core.position import FINISHED, Past, Position
from asyncsplit.core.progress import Progress
from asyncsplit.core.shuffle import ShuffleKey, shared_key, shared_keys
from asyncsplit.distribution import Distribution
from asyncsplit.errors import ConsumerConflictError, StaleEpochError
from asyncsplit.guard import DuringExecution, Guard, Settle
from asyncsplit.journal import Journal
from asyncsplit.lifeline import Lifelines
from asyncsplit.options import SplitOptions
from asyncsplit.sharing import Sharing
from asyncsplit.telemetry.epoch_spans import EpochSpans
from asyncsplit.telemetry.state import CoordinatorState
from asyncsplit.telemetry.tracing import Carrier
from asyncsplit.waits import Waits
from asyncsplit.wire import Failure, Lifeline, Started

T = TypeVar("T")

AHEAD_AFTER_S = 0.1
"""How long the executor waits with an epoch that nobody waits for: its start takes the interpreter
for 10 to 30 ms, in which the epoch under way gets no blocks."""


class EpochRunner:
    """The epochs of one dataset's splits: the one under way, and the barrier of the next."""

    def __init__(
        self,
        sharing: Sharing,
        options: SplitOptions,
        *,
        guard: Guard,
        state: CoordinatorState,
        journal: Journal,
        spans: EpochSpans,
    ) -> None:
        """Set up; nothing runs until all splits have arrived."""
        self._sharing = sharing
        self._replicas = sharing.replicas
        self._total = options.epochs
        self._guard = guard
        self._state = state
        self._journal = journal
        self._spans = spans
        self.epochs = Epochs(sharing.readers, replicas=sharing.replicas)
        if (noted := journal.read()) is not None:
            self.epochs.recover(noted)
        self._noted = self.epochs.noted
        self.distribution = Distribution(sharing.ledger(), guard, self._distribution_ended)
        """The blocks of the epoch under way."""
        self._failed: tuple[int, Failure, Collection[Stream]] | None = None
        self.lifelines = Lifelines()
        self._stopping: asyncio.Task[None] | None = None
        self._openings = openings.Openings()
        self._shuffles: dict[int, ShuffleKey | None] = {}
        self._keys: dict[int, ShuffleKey | None] = {}
        self._earlier: tuple[tuple[Past, ...], ...] = ()
        self._started: dict[int, Started] = {}
        self._ahead = Ahead(guard, state, spans, self._spawn)
        self.waits = waits = Waits(
            self.epochs, options, guard, state, lambda: self.distributions, self._lose
        )
        ahead = self._ahead
        state.watch(self.epochs, waits.liveness, waits.arrived_at, lambda: ahead.distribution)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shut = False

    async def admit(
        self,
        split: int,
        stream: Stream,
        lifeline: Lifeline,
        position: Position | None,
        *,
        early: bool,
    ) -> bool:
        """Let a stream in, once it is known whether the one that holds its split is dead.

        ``early`` says that its loop has not begun.

        Returns:
            Whether it takes the place of one that died in the epoch under way.

        Raises:
            StreamClosedError: If it was closed, has died, or the split was shut down.
            Exception: As `Epochs.arrive`; or what the epoch failed with that it had arrived for.
        """
        bury = functools.partial(self.bury, split, stream)
        is_dead = self.lifelines.attach(stream, lifeline, bury)
        try:
            await self.lifelines.verdict(self.epochs, split, stream)
            return self._let_in(split, stream, position, is_dead=is_dead(), early=early)
        except Exception:
            self.lifelines.detach(stream)
            raise

    def _let_in(
        self,
        split: int,
        stream: Stream,
        position: Position | None,
        *,
        is_dead: bool,
        early: bool,
    ) -> bool:
        if self._shut:
            raise openings.shut_down()
        if is_dead:
            raise openings.died()
        if self._failed is not None and stream in self._failed[2]:
            raise self._failed[1].unpack()
        # After the wait: calls that have waited for the same verdict go on one after the other.
        if (earlier := self.epochs.superseded_by(split, stream)) is not None:
            # It has told its consumer of the epoch, or it has not: that shows where it now stands.
            knew = position is not None and position.epoch > self.epochs.epoch
            self.leave(split, earlier, began=knew)
        try:
            takes_over = self.epochs.arrive(split, stream, position, early=early)
        except ConsumerConflictError:
            self._state.conflicts += 1
            raise
        self.waits.hear(split)
        return takes_over

    async def start(
        self,
        split: int,
        stream: Stream,
        shuffle: ShuffleKey | None,
        trace: Carrier | None,
        *,
        takes_over: bool,
        early: bool,
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
        if self._openings.expect(split):
            self.waits.arrived_at.pop(split, None)
            self._state.arrivals += 1
            self._spans.arrived(split, trace)
        if not early:
            self.waits.arrived_at.setdefault(split, self.waits.tick())
        self._shuffles[split] = shuffle
        self._open_if_ready()
        return await self._openings.wait(split)

    def reads(self, split: int, stream: Stream) -> bool:
        """Tell whether a stream reads the epoch under way."""
        return self.epochs.phase is Phase.RUNNING and self.epochs.active.get(split) == stream

    async def schema(self, during_execution: DuringExecution) -> Schema | None:
        """Return the dataset's schema; see `Guard.schema`.

        An epoch that was started ahead does not count as executing: it makes way, and is started
        anew afterwards.
        """
        try:
            return await self._guard.schema(
                during_execution, self._make_way, lambda: bool(self.epochs.reading)
            )
        finally:
            self._start_ahead()

    def _make_way(self) -> Settle | None:
        needed = self.epochs.is_executed(exhausted=self.distribution.ledger.finished)
        return self._ahead.make_way(needed=needed)

    async def shut_down(self) -> None:
        """Stop executing: whoever waits gets `StreamClosedError`, and no epoch starts any more."""
        self._shut = True
        self._give_up(openings.shut_down())
        await self.stopped()
        await self._guard.stop(self._ahead.drop())

    async def stopped(self) -> None:
        """Return when nothing is produced any more of an epoch that was given up."""
        if self._stopping is not None and not self._stopping.done():
            await asyncio.shield(self._stopping)

    @property
    def distributions(self) -> list[Distribution]:
        """The epoch's that is under way, and the next one's if it was started."""
        ahead = self._ahead.distribution
        return [self.distribution] if ahead is None else [self.distribution, ahead]

    def _open_if_ready(self) -> None:
        if self.epochs.noted is not self._noted:
            self._noted = self.epochs.noted
            self._journal.begin(self._noted or Noted(self.epochs.epoch, {}, {}))
        if not self.epochs.ready or self._shut:
            self._start_ahead()
            return
        resume = {
            split: position if position.saved else position.under(self._shuffles.get(split))
            for split, position in self.epochs.open().items()
        }
        self._noted = None
        self._state.epoch_opened()
        self._spans.opened(self.epochs.epoch, self.epochs.active)
        # Where somebody turns out to have read some of it, what was started ahead is of no use.
        settle = self._ahead.drop() if resume else None
        prepared = self._ahead.take()
        self.distribution = prepared.distribution if prepared else self._new_distribution(resume)
        self._spawn(self._run_epoch(self.epochs.epoch, resume, prepared, settle))

    async def _run_epoch(
        self,
        epoch: int,
        resume: Mapping[int, Position],
        prepared: Prepared | None,
        settle: Settle | None,
    ) -> None:
        """Start the executor for an epoch whose barrier has opened, and let everybody in."""
        if not self._is_starting(epoch):
            return
        distribution = self.distribution
        keys: dict[int, ShuffleKey | None] = {}
        try:
            self._earlier = self._sharing.read_before(resume, epoch)
            distribution.replay(self._sharing.replays(self._earlier))
            start = self._ahead.start
            await (prepared.starting if prepared else start(distribution, epoch, settle))
            asked = {reader: self._shuffles[reader] for reader in self.epochs.active}
            begun = {reader: position.shuffle for reader, position in resume.items()}
            keys = shared_keys(self._replicas, asked, begun)
        except Exception as error:  # the consumers get it, whatever it is
            distribution.error = distribution.error or error
        if not self._is_starting(epoch):
            return  # given up meanwhile: the guard stops the executor next
        if distribution.error is not None:
            self._fail(distribution.error)
            return
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
            self._openings.answer(split, self._started[split])
        self._start_ahead_soon()  # it may be exhausted
        self._end_if_all_left()

    def _start_at(self, split: int) -> Started:
        trace = self._spans.carrier
        sharing = self._sharing
        return Started(
            self._position(split),
            sharing.prefetch_bytes,
            trace=trace,
            on_demand=sharing.on_demand,
            report_after_s=sharing.report_after_s,
            more=self.epochs.epoch + 1 < (self._total or 0),
            repeatable=sharing.repeatable,
        )

    def _position(self, split: int) -> Position:
        position = self.distribution.ledger.logs[split].position
        return position._replace(epoch=self.epochs.epoch, earlier=self._earlier)

    def _start_ahead(self) -> None:
        """Start the next epoch before its barrier opens, if it may be."""
        if self._shut or self._ahead.distribution is not None:
            return
        exhausted = self.distribution.ledger.finished
        if self.epochs.may_start_ahead(exhausted=exhausted, total=self._total):
            self._ahead.begin(self._new_distribution(), self.epochs.epoch + 1)

    def _start_ahead_soon(self) -> None:
        """Start the next epoch ahead, but let this one's blocks go first if nobody waits for it."""
        if self.epochs.arrived:
            self._start_ahead()
        else:
            asyncio.get_running_loop().call_later(AHEAD_AFTER_S, self._start_ahead)

    def _drop_unawaited(self) -> None:
        """Stop the epoch started ahead if it is certain no more that it comes."""
        if self._ahead.distribution is not None and not self.epochs.is_awaited(self._total):
            self._spawn(self._guard.stop(self._ahead.drop()))

    def _distribution_ended(self, distribution: Distribution) -> None:
        """Start the next epoch, or fail; of one started ahead, that is seen to when it begins."""
        if distribution is not self.distribution:
            return
        if distribution.error is not None:
            self._fail(distribution.error)
        elif self.epochs.phase is Phase.RUNNING:
            self._start_ahead_soon()

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
        if stream in self.epochs.early:
            self.leave(split, stream, began=False)  # nobody's loop was broken off
            return
        if self.epochs.arrived.get(split) == stream:
            self._openings.reject(split, openings.died())
        if self.epochs.die(split, stream):
            self.waits.bury(split)
            self._spans.died(split)
        self._drop_unawaited()

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
            if stream in self.epochs.early and not self._shut:
                continue  # its loop waits for nothing; the next epoch will do
            self.epochs.leave(split, stream)
            self.lifelines.detach(stream)
            self._openings.reject(split, error)
        self._fail(error)
        self._drop_unawaited()

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
        self.lifelines.detach(stream)
        waited = self.epochs.arrived.get(split) == stream
        if not began and self.epochs.vacate(split, stream):
            if stream not in self.epochs.early:
                self.waits.mourn(split, "left as the epoch began,")
            self._openings.reject(split, openings.left())
            return
        running = began and self.epochs.leave(split, stream)
        if waited or running:
            self.waits.liveness.forget(split)
            self._openings.reject(split, openings.left())
        if running and self.epochs.phase is Phase.RUNNING:
            self._journal.leave(split)
            self.distribution.leave(split)
            self._start_ahead()  # while it is known that another comes
            self._end_if_all_left()
        self._open_if_ready()
        self._drop_unawaited()

    def _end_if_all_left(self) -> None:
        if self.epochs.phase is Phase.RUNNING and not self.epochs.active:
            self._end_epoch("completed" if self.distribution.ledger.finished else "stopped")

    def _fail(self, error: BaseException) -> None:
        """End the epoch under way for everybody with an error."""
        if self.epochs.phase is Phase.STARTING:
            for split in self.epochs.active:
                self._openings.reject(split, error)
        if self.epochs.phase is not Phase.WAITING:
            streams = tuple(self.epochs.active.values())
            self._failed = (self.epochs.epoch, Failure.of(error), streams)
            self._end_epoch("failed", error)

    def _end_epoch(self, outcome: str, error: BaseException | None = None) -> None:
        """Let the blocks go, and begin the next epoch if all wait for it.

        The executor is stopped, unless it is through: then the guard sees to it.
        """
        self._state.epoch_ended(outcome)
        self._spans.ended(outcome, self.distribution.ledger, error)
        for split, stream in self.epochs.active.items():
            self.lifelines.detach(stream)
            self.waits.liveness.forget(split)
        self.epochs.over()
        self._journal.begin(Noted(self.epochs.epoch, {}, {}))
        join = self.distribution.stop()
        self.distribution = self._new_distribution()
        if outcome != "completed":
            self._stopping = self._spawn(self._guard.stop(join, self._ahead.drop()))
        self._open_if_ready()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _new_distribution(self, resume: Mapping[int, Position] | None = None) -> Distribution:
        ledger = self._sharing.ledger(resume, self.distribution.ledger)
        return Distribution(ledger, self._guard, self._distribution_ended)
