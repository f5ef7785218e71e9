"""The protocol, message by message: the real coordinator, and consumers that a machine moves.

`LedgerMachine` drives one part of the core; here all of it answers together, as the coordinator
puts it together: barrier, ledger, liveness, takeover, restart and resume. Every message is on the
wire until the machine delivers it: late, twice, after later ones, or with its reply lost.
"""

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from ray.exceptions import OwnerDiedError

from asyncsplit.coordinator import SplitCoordinator
from asyncsplit.core.epochs import KEPT, Phase, Stream
from asyncsplit.core.position import FINISHED, Position, fingerprint
from asyncsplit.core.progress import Progress
from asyncsplit.core.readers import readers_of
from asyncsplit.core.routing import Equal
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.core.state import position_from, state_of
from asyncsplit.engine import Block, Bundle
from asyncsplit.errors import (
    ConsumerConflictError,
    ConsumerLostError,
    CoordinatorLostError,
    ExecutionActiveError,
    StaleEpochError,
    StateMismatchError,
    StreamClosedError,
)
from asyncsplit.options import SplitOptions, TelemetryConfig
from asyncsplit.telemetry.counters import ConsumerCounters
from asyncsplit.wire import Delivery, Failure, Lifeline, Rejoin, Slice, Started
from tests.simulation.clock import VirtualLoop
from tests.simulation.dataset import ROW_BYTES, Context, FakeDataset, Ref
from tests.simulation.world import fakes_installed, new_actor, use_clock

BARRIER_S, REJOIN_S = 10.0, 4.0
AT_ONCE_S = 1e-6
"""Time enough for all that needs none."""

COUNTERS = ConsumerCounters()


class SteadyDataset(FakeDataset):
    """Has the same blocks each time, as a dataset that preserves order."""

    sizes: tuple[int, ...] = (1,)

    def bundles(self, epoch: int) -> Iterator[Bundle]:
        """Produce one epoch, one block at a time."""
        first = 0
        for size in self.sizes:
            ref = Ref(range(first, first + size), self.loop, 0.0)
            yield Bundle((Block(ref, 0, size, size * ROW_BYTES, None),), None)  # type: ignore[arg-type]
            first += size


@dataclass(eq=False)
class Call:
    """A message, and whether its sender has the reply."""

    reader: "Reader"
    method: str
    args: tuple[Any, ...]
    stream: Stream
    answered: bool = False


@dataclass(eq=False)
class Parked:
    """Stands for the reference to a parked call: awaiting it shows the death of its owner."""

    broken: bool = False
    awaiting: "set[asyncio.Future[None]]" = field(default_factory=set)

    def __await__(self) -> Generator[Any, None, None]:
        """Raise when the call's owner is known to be dead."""
        if not self.broken:
            waiter = asyncio.get_running_loop().create_future()
            self.awaiting.add(waiter)
            try:
                yield from waiter.__await__()
            finally:
                self.awaiting.discard(waiter)
        raise OwnerDiedError("00", None, "")

    def snap(self) -> None:
        self.broken = True
        for waiter in self.awaiting:
            waiter.set_result(None)


@dataclass(eq=False)
class Reader:
    """A consumer: what feed and stream know of the protocol, without blocks and batches."""

    job: "Job"
    split: int
    name: str
    position: Position | None = None
    alive: bool = True
    ousted: bool = False
    """Thought dead while it was not, or an intruder from the beginning."""
    number: int = 0
    stream: Stream | None = None
    parked: Parked = field(default_factory=Parked)

    @property
    def lifeline(self) -> Lifeline:
        return Lifeline(self.name, self.parked)  # type: ignore[arg-type]

    def open(self, *, early: bool = False) -> None:
        self.number += 1
        self.stream = Stream(self.name, self.number)
        self.started: Started | None = None
        self.cursor: int | None = None
        self.first = self.fed = self.rows = self.check = 0
        self.edges: list[int] = [0]
        """Rows at which the leases delivered begin, and the one after them."""
        self.sizes: list[int] = []
        self.last = False
        self.pulling: Call | None = None
        if self.number == 1:
            self.job.send(self, "hold", self.name)
        self.arrive(self.position, early=early)

    @property
    def is_new(self) -> bool:
        """Whether it has not begun to read, and has no state."""
        return self.position is None and (self.stream is None or self.started is None)

    def arrive(self, position: Position | None, *, early: bool = False) -> None:
        self.starting: Call | None = self.job.send(
            self,
            "start_epoch",
            self.split,
            self.stream,
            self.lifeline,
            position,
            None,
            0,
            COUNTERS,
            None,
            early,
        )

    @property
    def progress(self) -> Progress:
        return Progress(self.rows, self.fed)

    def act(self, begin: int, share: float) -> None:
        """Do what a training loop does next: begin leases, finish rows, ask for more, or end."""
        if self.stream is None:
            self.open()
            return
        if self.started is None or self.starting is not None:
            return
        if self.cursor is not None:
            self.fed = min(self.fed + begin, self.cursor)
            begun = self.edges[self.fed - self.first]
            self.rows = max(self.rows, self.rows + int((begun - self.rows) * share))
            self.job.finish(self, self.rows)
            if self.last and self.rows == self.edges[-1]:
                self.close(ended=True)
                return
        ahead = sum(self.sizes[self.fed - self.first :])
        if self.pulling is None and not self.last and ahead < self.started.prefetch_bytes:
            self.pulling = self.say("pull", self.cursor, self.progress)
        else:
            self.say("acknowledge", self.progress)

    def say(self, method: str, *what: object) -> Call:
        assert self.started is not None
        epoch = self.started.epoch
        return self.job.send(self, method, self.split, epoch, self.stream, *what, COUNTERS)

    def close(self, *, ended: bool = False) -> None:
        progress = None
        if self.started is not None:
            progress = self.progress
            self.position = Position(self.started.epoch + 1)
            if not self.ousted and not ended:
                self.job.leave_early(self.started.epoch, self.split)
        self.job.send(self, "notify_split_finished", self.split, self.stream, progress, COUNTERS)
        self.stream = self.started = None

    def fail(self) -> None:
        """Let go of the stream; who was replaced ends."""
        self.close()
        if self.ousted:
            self.alive = False
            self.job.loop.call_later(0.5, self.die)

    def where(self) -> Position:
        """Return what its state would be saved as."""
        if self.stream is None or self.started is None:
            return self.position or Position(0)
        if self.cursor is None:
            return self.started.position
        check = self.check if self.fed > self.first else self.check_at_start
        for i, (first, end) in enumerate(zip(self.edges, self.edges[1:], strict=False)):
            if first >= self.rows or i >= self.fed - self.first:
                break
            check = fingerprint(check, end - first)
        return Position(
            self.started.epoch, self.rows, check, self.fed, earlier=self.started.position.earlier
        )

    def take(self, call: Call, reply: Any) -> None:
        """Take the reply to a call of the present stream."""
        if call is self.starting:
            if isinstance(reply, Failure):
                self.fail()
                return
            self.starting = None
            if self.cursor is None:
                self.started = Started(*reply)
                self.rows = self.started.position.rows
                self.job.begin(self, self.started)
                if self.started.delivery is not None:
                    self.receive(Delivery(*self.started.delivery))
        elif call is self.pulling:
            self.pulling = None
            if isinstance(reply, Failure):
                self.fail()
            elif isinstance(reply, Rejoin):
                if self.cursor is not None:
                    self.cursor = self.fed
                    del self.edges[self.fed - self.first + 1 :]
                    del self.sizes[self.fed - self.first :]
                self.last = False
                self.arrive(self.where())
            else:
                self.receive(reply)

    def receive(self, reply: Delivery) -> None:
        assert self.started is not None
        if self.cursor is None:
            self.first = self.fed = self.cursor = reply.cursor
            self.edges = [self.started.position.rows - reply.skip_rows]
            self.check = self.check_at_start = reply.check
            if reply.skip_rows:
                first = Slice(*reply.slices[0])
                self.check_at_start = fingerprint(reply.check, first.stop - first.start)
        assert reply.cursor == self.cursor, "what was asked for"
        for part in map(Slice._make, reply.slices):
            assert isinstance(part.ref, Ref)
            ids = list(part.ref.ids[part.start : part.stop])
            self.job.deliver_rows(self, self.edges[-1], ids, padding=part.padding)
            self.edges.append(self.edges[-1] + len(ids))
            self.sizes.append(part.size_bytes)
            self.cursor += 1
        self.last = reply.end
        if reply.end:
            self.job.end(self, self.edges[-1])

    def die(self) -> None:
        """Let the coordinator know that the process has died."""
        self.job.check()  # an epoch may have begun with it, before the news
        self.job.give_up(self)
        self.parked.snap()


@dataclass
class Share:
    """What a split got of an epoch."""

    ids: list[int] = field(default_factory=list)
    padded: int = 0
    """How many of them repeat others: the last."""
    finished: int = 0
    committed: int = 0
    """As the present coordinator says."""
    ended: bool = False
    here: bool = False
    """Whether something of it was delivered since states were loaded."""


class Job:
    """A coordinator, its consumers, what is on the wire between them, and what must hold."""

    def __init__(
        self,
        n: int,
        mode: tuple[Equal, str, bool],
        sizes: tuple[int, ...],
        budget: int,
        replicas: int = 1,
        epochs: int | None = None,
    ) -> None:
        self.epochs = epochs
        """How many there will be, if the coordinator knows."""
        self.n = n * replicas
        """How many consumers there are; where they are replicas, each is called a split here."""
        self.replicas = replicas
        self.equal, self.routing, self.in_order = mode
        self.goes_on = self.routing == "rows" and self.in_order
        """Whether an epoch goes on when the coordinator was restarted."""
        self.sizes = sizes
        self.budget = budget
        self.now = 0.0
        self.readers: dict[int, Reader] = {}
        self.others: list[Reader] = []
        """Alive, and not who should read the split."""
        self.born: dict[int, list[Reader]] = {}
        self.states: list[dict[str, Any]] | None = None
        self.disturbed = False
        """Whether somebody has died or been restarted since states were loaded."""
        self.generation = 0
        self.shares: dict[tuple[int, int, int], Share] = {}
        self.taken: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
        """For each epoch, which split has got a row as which replica; those of runs before have it
        from -1."""
        self.partial: set[tuple[int, int]] = set()
        """Epochs that somebody left early."""
        self.left: set[tuple[int, int, int]] = set()
        """Who has left one early."""
        self.failed_epochs: set[int] = set()
        self.epoch = -1
        self.came_back = False
        """Whether the coordinator was restarted in this epoch, or after it."""
        self.may_drop: dict[tuple[int, int], int] = {}
        self.wire: list[Call] = []
        new_actor()
        self.start()
        for split in range(self.n):
            self.spawn(split)

    # What happens to it

    def restart(self) -> None:
        """Put a new coordinator in place of the old one; unanswered calls are sent again."""
        self.close()
        self.start()

    def start(self) -> None:
        """Start a coordinator."""
        self.loop = loop = VirtualLoop()
        loop.start_at(self.now)
        self.unhandled: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: self.unhandled.append(context))
        use_clock(loop)
        dataset = SteadyDataset(
            sum(self.sizes),
            loop,
            random.Random(0),
            slow_start_s=0.3,
            context=Context(preserve_order=self.in_order),
        )
        self.dataset = dataset
        dataset.sizes = self.sizes
        loop.seconds_of = dataset.seconds_of
        options = SplitOptions(
            routing=self.routing,  # type: ignore[arg-type]
            prefetch_bytes=self.budget,
            barrier_timeout_s=BARRIER_S,
            rejoin_timeout_s=REJOIN_S,
            epochs=self.epochs,
            replicas=self.replicas,
            telemetry=TelemetryConfig(enabled=False),
        )
        splits = self.n // self.replicas
        self.coordinator = SplitCoordinator(splits, self.equal, None, options, dataset)  # type: ignore[arg-type]
        self.waiting: dict[int, set[Stream]] = {}
        self.closed: set[Stream] = set()
        self.places: dict[int, Stream] = {}
        self.fenced: set[Stream] = set()
        self.heard: dict[int, float] = {}
        self.died: dict[int, float] = {}
        self.failed: object = None
        self.failures: list[tuple[float, dict[int, float], dict[int, float]]] = []
        self.history: list[Call] = []
        self.parked: dict[asyncio.Task[None], Call] = {}
        self.bounds: dict[int, int] = {}

    def close(self) -> None:
        """End the coordinator's process."""
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks))
        self.coordinator._journal.close()
        self.loop.close()

    def spawn(self, split: int, *, intruder: bool = False) -> Reader:
        """Start a process that consumes a split."""
        born = self.born.setdefault(split, [])
        position = None
        if self.states is not None and self.coordinator._runner.epochs.epoch < 0:
            own = len(self.states) == self.n
            position = position_from(
                self.states[split] if own else self.states,
                split // self.replicas,
                self.n // self.replicas,
            )
        reader = Reader(self, split, f"{split}-{len(born)}", position, ousted=intruder)
        born.append(reader)
        if intruder:
            self.others.append(reader)
        else:
            self.readers[split] = reader
        return reader

    def kill(self, split: int, news_after_s: float) -> None:
        """Kill a split's consumer; what it has sent may still arrive."""
        reader = self.readers[split]
        reader.alive = False
        self.disturbed = True
        self.loop.call_later(news_after_s, reader.die)
        self.died.setdefault(split, self.now)
        self.pass_time(AT_ONCE_S)

    def give_up(self, reader: Reader) -> None:
        """Note that a consumer known to be dead does not count as arrived."""
        waiting = self.waiting.get(reader.split, set())
        waiting -= {stream for stream in waiting if stream.consumer == reader.name}

    def send(self, reader: Reader, method: str, *args: Any) -> Call:
        assert reader.stream is not None
        self.wire.append(Call(reader, method, args, reader.stream))
        return self.wire[-1]

    def deliver(self, call: Call, *, reply_lost: bool = False) -> None:
        """Let a message arrive, and everything happen that needs no time."""
        reader = call.reader
        present = reader.alive and call.stream == reader.stream
        if not present and reader not in self.born[reader.split][-KEPT // 2 :]:
            # Nothing of theirs is on its way any more, as `KEPT` says, which counts those who
            # close: some who came before have closed later.
            return
        self.history.append(call)
        if call.method == "report_death":
            self.give_up(reader)
        if call.method == "start_epoch":
            self.waiting.setdefault(call.reader.split, set()).add(call.stream)
        if call.method == "notify_split_finished":
            self.closed.add(call.stream)
            if call.args[2] is None or reader.ousted:
                self.died.setdefault(reader.split, self.now)
            self.note_end(call)
        refused = call.method in ("start_epoch", "pull", "acknowledge") and (
            call.stream in self.closed or call.stream in self.fenced
        )
        task = self.loop.create_task(self.serve(call, refused, reply_lost))
        self.parked[task] = call
        task.add_done_callback(self.parked.pop)
        came = self.now
        self.pass_time(AT_ONCE_S)
        arrived = self.coordinator._runner.epochs.holder(reader.split) == call.stream
        waits = call.method == "pull" and not task.done()
        if waits or (arrived and call.method == "start_epoch"):
            self.hear(reader, came)

    async def serve(self, call: Call, refused: bool, reply_lost: bool) -> None:
        reader, came = call.reader, self.now
        reply = await getattr(self.coordinator, call.method)(call.args)
        failed = isinstance(reply, Failure)
        if failed:
            self.judge(call, reply.unpack())
        elif call.method in ("pull", "acknowledge"):
            if not isinstance(reply, Rejoin):
                self.hear(reader, came)
            empty = isinstance(reply, Delivery) and not reply.slices and not reply.end
            assert not refused or empty or isinstance(reply, Rejoin), f"{call} was accepted"
        elif call.method == "start_epoch":
            assert not refused, f"{call} was accepted"
        if reply_lost and not call.answered and reader.alive:
            self.wire.append(call)
        elif not call.answered and reader.alive:
            call.answered = True
            if call.stream == reader.stream:
                reader.take(call, reply)

    def judge(self, call: Call, error: BaseException) -> None:
        """Check that an error has a reason."""
        reader = call.reader
        if call.answered or call.stream != reader.stream:
            return  # nobody waits for it
        if isinstance(error, ConsumerLostError):
            what = r"(?:replica (\d) of )?split (\d) (died|left|has not been heard of)"
            stories = re.findall(what, str(error))
            assert stories
            for replica, its_split, story in stories:
                split = int(its_split) * self.replicas + int(replica or 0)
                # The epoch may have failed earlier, and its consumer hears of it now.
                moments = [(self.loop.time(), self.heard, self.died), *self.failures]
                if story != "has not been heard of":
                    bound = REJOIN_S
                    silent = [now - died.get(split, now) for now, _, died in moments]
                else:
                    bound = BARRIER_S
                    silent = [now - heard.get(split, 0.0) for now, heard, _ in moments]
                assert max(silent) >= bound - 0.001, f"too early: {error}"
        elif isinstance(error, ConsumerConflictError):
            rivals = [r for r in self.others if r.split == reader.split]
            assert reader.ousted or not reader.alive or rivals, error
        elif isinstance(error, CoordinatorLostError):
            assert not self.goes_on, error
        elif isinstance(error, StateMismatchError):
            assert self.states is not None, error
            if "Load states into a new split" in str(error):
                assert self.coordinator._runner.epochs.holder(reader.split) != call.stream, error
            else:
                assert self.disturbed, error
            reader.position = None
        else:  # of a message that is late, or of an epoch that failed before
            assert isinstance(error, StaleEpochError | StreamClosedError), (call, error)

    def pass_time(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.now = self.loop.time()
        if seconds > BARRIER_S:
            self.note_failure()  # an epoch may have failed, and the next one begun since
        assert not self.unhandled, self.unhandled[0]
        self.check()

    # What is noted of it

    def note_failure(self) -> None:
        """Remember who had been heard of, for those who are told later."""
        moment = (self.loop.time(), dict(self.heard), dict(self.died))
        self.failures = [moment, *self.failures[:3]]

    def hear(self, reader: Reader, came: float) -> None:
        """Note a message that was accepted."""
        split = reader.split
        self.heard[split] = max(self.heard.get(split, came), came)
        if reader.alive and not reader.ousted:
            self.died.pop(split, None)

    def share(self, epoch: int, split: int) -> Share:
        return self.shares.setdefault((self.generation, epoch, split), Share())

    def begin(self, reader: Reader, started: Started) -> None:
        share = self.share(started.epoch, reader.split)
        assert started.position.rows <= share.finished, "rows are lost"
        if started.epoch == self.coordinator._runner.epochs.epoch:
            assert started.position.rows >= share.committed, "committed rows come again"

    def finish(self, reader: Reader, rows: int) -> None:
        assert reader.started is not None
        share = self.share(reader.started.epoch, reader.split)
        share.finished = max(share.finished, rows)

    def deliver_rows(self, reader: Reader, first: int, ids: list[int], *, padding: bool) -> None:
        assert reader.started is not None
        epoch = reader.started.epoch
        share = self.share(epoch, reader.split)
        assert first <= len(share.ids), "rows are left out"
        share.here = True
        known = share.ids[first : first + len(ids)]
        assert known == ids[: len(known)], "what comes again is the same"
        taken = self.taken.setdefault((self.generation, epoch), {})
        replica = reader.split % self.replicas
        for i in ids[len(known) :]:
            share.ids.append(i)
            share.padded += padding
            if not padding:
                row = i, replica
                assert row not in taken, f"row {i} goes to {reader.split}, and to {taken[row]}"
                taken[row] = reader.split
        for split in readers_of(reader.split // self.replicas, self.replicas):
            fellow = self.share(epoch, split).ids
            assert all(mine == its for mine, its in zip(share.ids, fellow, strict=False)), (
                "the same"
            )

    def end(self, reader: Reader, rows: int) -> None:
        """Check an epoch that all have read to its end."""
        assert reader.started is not None
        epoch = reader.started.epoch
        share = self.share(epoch, reader.split)
        assert rows == len(share.ids), "the whole share"
        share.ended = True
        shares = [self.share(epoch, split) for split in range(self.n)]
        if not all(s.ended for s in shares) or (self.generation, epoch) in self.partial:
            return
        missing = sum(self.sizes) - len(
            {i for i, _ in self.taken.get((self.generation, epoch), {})}
        )
        if self.equal:
            assert len({len(s.ids) for s in shares}) == 1, "equal shares"
        if self.equal is True:
            usual = self.n // self.replicas - 1
            missing -= min(missing, self.may_drop.get((self.generation, epoch), usual))
        assert not missing, f"{missing} rows of epoch {epoch} are lost"

    def note_end(self, call: Call) -> None:
        """Note that somebody has read a share to its end who is thought dead, and not told so."""
        _, stream, progress, _ = call.args
        runner, split = self.coordinator._runner, call.reader.split
        ledger = runner.distribution.ledger
        if call.reader.ousted and runner.reads(split, stream) and ledger.exhausted(split):
            share = self.share(runner.epochs.epoch, split)
            whole = ledger.logs[split].assigned_rows
            share.ended |= progress is not None and progress.rows == whole

    def leave_early(self, epoch: int, split: int) -> None:
        self.partial.add((self.generation, epoch))
        self.left.add((self.generation, epoch, split))
        self.share(epoch, split).finished = FINISHED

    def whole(self) -> set[int]:
        """Return the epochs that all splits have read to the end."""
        epochs = {epoch for generation, epoch, _ in self.shares if generation == self.generation}
        return {
            epoch
            for epoch in epochs
            if all(self.share(epoch, split).ended for split in range(self.n))
            and (self.generation, epoch) not in self.partial
        }

    # What must hold

    def check(self) -> None:
        """Check what must hold between two messages."""
        runner = self.coordinator._runner
        epochs, ledger = runner.epochs, runner.distribution.ledger
        # An epoch can have begun and failed since the last look.
        if runner._failed is not self.failed:
            self.note_failure()
            self.failed = runner._failed
            assert runner._failed is not None
            self.failed_epochs.add(runner._failed[0])
        if epochs.epoch > self.epoch:
            self.check_barrier(epochs.epoch)
        elif self.came_back and epochs.epoch == self.epoch and epochs.active:
            self.came_back = False
            self.places.clear()
            assert all(self.waiting.get(split) for split in epochs.active), "who has arrived"
        if epochs.epoch < self.epoch - self.came_back:
            known = any(self.share(self.epoch, split).here for split in range(self.n))
            assert self.came_back and not known, "epochs only grow"  # noqa: PT018
        for split in range(self.n):
            assert epochs.holder(split) not in self.closed | self.fenced, "it is closed"
        for split in [s for s in self.places if s not in epochs.active]:
            self.fenced.add(self.places.pop(split))
        for split, stream in epochs.active.items():
            before = self.places.setdefault(split, stream)
            if before != stream:
                self.fenced.add(before)
                self.places[split] = stream
                self.bounds[split] = ledger.logs[split].leased_bytes
        for ahead in runner.distributions[1:]:
            assert epochs.arrived or self.epochs, "nobody waits for what was started ahead"
            for log in ahead.ledger.logs:
                assert log.waiting_bytes < self.budget + max(self.sizes) * ROW_BYTES
        if epochs.phase is not Phase.RUNNING:
            self.bounds.clear()
            return
        for split, log in enumerate(ledger.logs):
            share = self.share(epochs.epoch, split)
            assert log.committed_rows <= share.finished, "nobody has finished that"
            if not log.left and split in epochs.active:
                assert log.position.rows >= share.committed, "a committed row is not any more"
                share.committed = log.position.rows
            self.check_budget(split)
        assert ledger.produced_rows + ledger.router.padded_rows == (
            ledger.leased_rows
            + sum(ledger.committed_rows)
            + ledger.truncated_rows
            + ledger.router.unassigned_rows
        ), "each row is unassigned, leased, committed or truncated"

    def check_barrier(self, epoch: int) -> None:
        """Each split has arrived, by name, and the epoch is the next one."""
        if self.goes_on and self.epoch >= 0 and self.epoch not in self.failed_epochs:
            for split in range(self.n):
                place = (self.generation, self.epoch, split)
                assert self.share(self.epoch, split).ended or place in self.left, (
                    f"split {split} has not had its share of epoch {self.epoch}"
                )
        self.epoch = epoch
        self.came_back = False
        absent = [split for split in range(self.n) if not self.waiting.get(split)]
        assert not absent, f"epoch {epoch} began without splits {absent}"
        # Those who have finished it stay, and those about whom no verdict has been reached.
        active = set(self.coordinator._runner.epochs.active.values())
        self.waiting = {}
        for call in self.parked.values():
            if call.method == "start_epoch" and call.stream not in active:
                self.waiting.setdefault(call.reader.split, set()).add(call.stream)
        self.places.clear()
        self.bounds.clear()

    def check_budget(self, split: int) -> None:
        """What waits for a consumer is bounded, whatever the coordinator thinks of it."""
        log = self.coordinator._runner.distribution.ledger.logs[split]
        reader = self.readers[split]
        if log.left or reader.stream is None or self.places.get(split) != reader.stream:
            return
        begun = max(log.first_seq, reader.fed)
        leases = log.read(min(begun, log.next_seq), max_leases=1000)
        waiting = sum(lease.part.size_bytes for lease in leases)
        assert waiting <= log.waiting_bytes, "it has not begun what counts as begun"
        bound = self.budget + max(self.sizes) * ROW_BYTES
        if waiting < bound:
            self.bounds.pop(split, None)
        taken_over = self.bounds.get(split, 0) + max(self.sizes) * ROW_BYTES
        assert waiting < bound or waiting <= taken_over, f"{waiting} bytes wait, {bound} may"


SPLITS = st.integers(0, 5)
FATES = st.sampled_from(("arrives", "arrives", "arrives", "late", "twice", "reply lost"))


class ProtocolMachine(RuleBasedStateMachine):
    """Moves a job, one event at a time."""

    @initialize(
        n=st.integers(1, 3),
        mode=st.sampled_from(
            [
                (False, "rows", True),
                (True, "rows", True),
                ("pad", "rows", True),
                (False, "demand", True),
                (False, "rows", False),
            ]
        ),
        sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
        budget=st.sampled_from((1, 60, 1000)),
        replicas=st.sampled_from((1, 1, 2, 3)),
    )
    def start(
        self,
        n: int,
        mode: tuple[Equal, str, bool],
        sizes: list[int],
        budget: int,
        replicas: int = 1,
        epochs: int | None = None,
    ) -> None:
        self.fakes = contextlib.ExitStack()
        self.fakes.enter_context(fakes_installed())
        self.job = Job(n, mode, tuple(sizes), budget, replicas, epochs)

    def teardown(self) -> None:
        if not hasattr(self, "job"):
            return
        try:
            self.somebody_can_always_go_on()
        finally:
            self.job.close()
            self.fakes.close()

    def split(self, which: int) -> int:
        return which % self.job.n

    @rule(which=SPLITS, begin=st.integers(0, 3), share=st.sampled_from((0.0, 0.5, 1.0)), fate=FATES)
    def a_consumer_acts(self, which: int, begin: int, share: float, fate: str) -> None:
        reader = self.job.readers[self.split(which)]
        if not reader.alive:
            return
        before = len(self.job.wire)
        reader.act(begin, share)
        sent = self.job.wire[before:]
        if fate != "late":
            del self.job.wire[before:]
            for call in sent:
                if fate == "twice":
                    self.job.deliver(call)
                self.job.deliver(call, reply_lost=fate == "reply lost")

    @rule(times=st.integers(1, 4), begin=st.integers(1, 4), idle=st.integers(0, 5))
    def all_act(self, times: int, begin: int, idle: int) -> None:
        for _ in range(times):
            self.step(begin, idle)

    @rule(which=SPLITS)
    def one_is_slow(self, which: int) -> None:
        """The others wait for it, and longer than for one that says nothing."""
        slow = self.job.readers[self.split(which)]
        for _ in range(5):
            for reader in self.job.readers.values():
                if reader.alive:
                    reader.act(*((0, 0.0) if reader is slow else (4, 1.0)))
            self.deliver_all()
            self.job.pass_time(3.0)

    def step(self, begin: int, idle: int | None = None) -> None:
        """Have all go on, but for one that begins and finishes nothing."""
        for reader in [*self.job.readers.values(), *self.job.others]:
            if reader.alive:
                reader.act(*((0, 0.0) if reader.split == idle else (begin, 1.0)))
        self.deliver_all()
        self.job.pass_time(0.1)

    def deliver_all(self) -> None:
        sent, self.job.wire = self.job.wire, []
        for call in sent:
            self.job.deliver(call)

    @precondition(lambda self: self.job.wire)
    @rule(which=st.integers(0, 20), lost=st.booleans())
    def a_late_message_arrives(self, which: int, lost: bool) -> None:
        call = self.job.wire.pop(which % len(self.job.wire))
        self.job.deliver(call, reply_lost=lost)

    @precondition(lambda self: self.job.history)
    @rule(which=st.integers(0, 30))
    def an_old_message_arrives_again(self, which: int) -> None:
        call = self.job.history[-1 - which % len(self.job.history)]
        if call.method != "hold":
            self.job.deliver(call)

    @precondition(lambda self: any(c.method == "acknowledge" for c in self.job.wire))
    @rule()
    def progress_is_lost(self) -> None:
        self.job.wire = [call for call in self.job.wire if call.method != "acknowledge"]

    @rule(which=SPLITS, news_after_s=st.sampled_from((0.0, 1.5)), arrives=st.booleans())
    def a_consumer_is_killed(self, which: int, news_after_s: float, arrives: bool) -> None:
        split = self.split(which)
        reader = self.job.readers[split]
        if not reader.alive:
            return
        self.job.kill(split, news_after_s)
        if not arrives:
            self.job.wire = [call for call in self.job.wire if call.reader is not reader]

    @rule(which=SPLITS)
    def a_consumer_is_replaced(self, which: int) -> None:
        split = self.split(which)
        if not self.job.readers[split].alive:
            self.job.spawn(split)

    @rule(which=SPLITS)
    def a_live_consumer_is_thought_dead(self, which: int) -> None:
        split = self.split(which)
        reader = self.job.readers[split]
        if not reader.alive or reader.stream is None:
            return
        call = Call(reader, "report_death", (split, reader.stream), reader.stream)
        self.job.deliver(call)
        self.job.died.setdefault(split, self.job.now)
        reader.ousted = True
        self.job.disturbed = True
        self.job.others.append(reader)
        self.job.spawn(split)

    @rule(which=SPLITS)
    def an_intruder_comes(self, which: int) -> None:
        split = self.split(which)
        holder = self.job.coordinator._runner.epochs.holder(split)
        reader = self.job.readers[split]
        if reader.alive and holder is not None and holder == reader.stream:
            intruder = self.job.spawn(split, intruder=True)
            intruder.open()
            self.deliver_all()
            self.job.pass_time(4.0)
            # The one who was there may have lost its place meanwhile.
            lost = self.job.coordinator._runner.epochs.is_closed(split, holder)
            assert intruder.stream is None or lost, "it is refused"
            intruder.alive = False
            intruder.die()
            self.job.died.setdefault(split, self.job.now)
            self.job.others.remove(intruder)

    @rule(which=SPLITS, at_once=st.booleans())
    def a_loop_is_left(self, which: int, at_once: bool) -> None:
        reader = self.job.readers[self.split(which)]
        if reader.alive and reader.stream is not None:
            reader.close()
            if at_once:
                self.job.deliver(self.job.wire.pop())

    @rule(seconds=st.sampled_from((0.01, 0.5, 2.0, 6.0)))
    def time_passes(self, seconds: float) -> None:
        self.job.pass_time(seconds)

    @rule()
    def nothing_is_said_for_long(self) -> None:
        """Every wait ends: with what was waited for, or with an error."""
        self.job.pass_time(2 * BARRIER_S + REJOIN_S)
        waiting = [
            call
            for call in self.job.parked.values()
            if call.method != "hold" and not call.reader.ousted
        ]
        assert not waiting, f"{waiting} wait for ever"
        if self.job.coordinator._runner.epochs.phase is Phase.WAITING:
            assert self.job.dataset.is_idle, "what nobody waits for is executed"

    @rule()
    def the_schema_is_asked_for(self) -> None:
        """It is refused while an epoch is executed that has begun, not for one started ahead."""
        job, epochs = self.job, self.job.coordinator._runner.epochs

        async def ask() -> None:
            began = epochs.epoch, epochs.phase
            reply = await job.coordinator.get_dataset_schema(("raise",))
            if isinstance(reply, Failure):
                assert isinstance(reply.unpack(), ExecutionActiveError)
                now = epochs.epoch, epochs.phase
                waited = began == now == (epochs.epoch, Phase.WAITING)
                assert not waited, "it was refused for an epoch that had not begun"

        asking = job.loop.create_task(ask())
        job.pass_time(1.0)
        asking.result()

    @rule()
    def the_coordinator_dies(self) -> None:
        """Ray sends calls again that were not answered, of those who are alive."""
        job = self.job
        unanswered = [*job.parked.values(), *job.wire]
        job.restart()
        job.came_back = True
        job.disturbed = True
        job.wire = [
            call
            for call in dict.fromkeys(unanswered)
            if call.reader.alive and not call.answered and call.method != "report_death"
        ]
        for split in range(job.n):
            # Nobody tells the new coordinator of those who died before it came.
            if not job.readers[split].alive:
                job.spawn(split)
        if not job.goes_on:
            job.generation += 1

    @precondition(lambda self: self.job.goes_on)
    @rule(n=st.integers(1, 3))
    def the_run_is_resumed(self, n: int) -> None:
        """All states are saved, all processes end, and a new run of ``n`` splits loads them."""
        job = self.job
        n *= job.replicas
        if not all(reader.alive for reader in job.readers.values()):
            return
        unknown = any(reader.is_new for reader in job.readers.values())
        if unknown and (job.disturbed or job.coordinator._runner.epochs.epoch >= 0):
            return  # it has no state, and should have been given that of the one before
        stood = [job.readers[split].where() for split in range(job.n)]
        epoch = min(position.epoch for position in stood)
        if any(p.epoch > epoch + 1 or (p.epoch > epoch and p.rows) for p in stood):
            return  # not states of one moment: somebody began anew
        if len({p.earlier for p in stood if p.epoch == epoch}) > 1:
            return
        states = [
            state_of(position, split // job.replicas, job.n // job.replicas)
            for split, position in enumerate(stood)
        ]
        if n != job.n and any(
            states[split] != states[split - split % job.replicas] for split in range(job.n)
        ):
            return  # not of the same step
        job.states = json.loads(json.dumps(states))
        job.disturbed = False
        shares = [job.share(epoch, split) for split in range(job.n)]
        rows = [p.rows if p.epoch == epoch else FINISHED for p in stood]
        for share, finished in zip(shares, rows, strict=True):
            share.finished = finished
        if n != job.n:
            self.begin_generation(epoch, shares, rows, n)
        job.n = n
        job.epoch, job.came_back = -1, False
        for share in job.shares.values():
            share.committed, share.here = 0, False
        new_actor()
        job.restart()
        job.wire.clear()
        job.readers.clear()
        job.others.clear()
        for split in range(n):
            job.spawn(split)

    def begin_generation(self, epoch: int, shares: list[Share], rows: list[int], n: int) -> None:
        job = self.job
        old, new = (job.generation, epoch), (job.generation + 1, epoch)
        if any(rows) or old in job.may_drop:
            usual = job.n // job.replicas - 1
            job.may_drop[new] = job.may_drop.get(old, usual) + n // job.replicas - 1
        before = {row: -1 for row, split in job.taken.get(old, {}).items() if split == -1}
        for split, (share, finished) in enumerate(zip(shares, rows, strict=True)):
            own = len(share.ids) - share.padded
            ids = share.ids[: min(finished, own)]
            before |= dict.fromkeys(((i, split % job.replicas) for i in ids), -1)
        job.taken[new] = before
        if old in job.partial:
            job.partial.add(new)
        job.generation += 1

    def somebody_can_always_go_on(self) -> None:
        """Whatever has happened: when all come and read, they get a whole epoch."""
        job = self.job
        for reader in job.others:
            reader.alive = False
            job.loop.call_later(0.5, reader.die)
        self.deliver_all()
        for split in range(job.n):
            if not job.readers[split].alive:
                job.spawn(split)
        before = job.whole()
        for _ in range(200):
            if job.whole() - before:
                return
            self.step(100)
        raise AssertionError(f"no epoch comes to its end: {job.coordinator._runner.epochs}")


def test_who_leaves_while_a_restarted_coordinator_starts_keeps_nobody_waiting() -> None:
    machine = ProtocolMachine()
    machine.start(n=2, mode=(False, "rows", True), sizes=[4] * 8, budget=1)
    job = machine.job
    try:
        machine.step(1)
        while job.readers[0].rows < 4:
            machine.step(1)
        machine.the_coordinator_dies()
        while job.coordinator._runner.epochs.phase is Phase.WAITING:
            for reader in job.readers.values():
                reader.act(1, 1.0)
            sent, job.wire = job.wire, []
            for call in sent:
                job.deliver(call)
        assert job.coordinator._runner.epochs.phase is Phase.STARTING
        leaves, stays = job.readers[0], job.readers[1]
        leaves.close()
        machine.deliver_all()
        for _ in range(100):  # a block may take 3 s
            if stays.rows == 16:
                break
            stays.act(1, 1.0)
            machine.deliver_all()
            job.pass_time(0.1)
        assert stays.rows == 16
    finally:
        machine.job.close()
        machine.fakes.close()


@pytest.mark.parametrize("overtaken", [False, True])
def test_a_loop_cancelled_as_its_epoch_begins_loses_nothing(overtaken: bool) -> None:
    """Its consumer has not heard that the barrier has opened, and iterates once more."""
    machine = ProtocolMachine()
    machine.start(n=2, mode=(True, "rows", True), sizes=[4] * 8, budget=60)
    job = machine.job
    try:
        leaves, stays = job.readers[0], job.readers[1]
        leaves.open()
        machine.deliver_all()
        stays.open()
        machine.deliver_all()
        job.pass_time(1.0)
        assert job.coordinator._runner.epochs.phase is Phase.RUNNING
        leaves.started = None  # the answer is there, and nobody has looked at it
        leaves.close()
        leaves.open()
        if overtaken:
            job.wire.reverse()
        while not job.whole():
            machine.step(4)
        assert job.whole() == {0}
    finally:
        machine.teardown()


def test_who_shuffles_otherwise_while_a_restarted_coordinator_starts_begins_anew() -> None:
    """In the order of the one before, its rows would be others: some would be lost."""
    machine = ProtocolMachine()
    machine.start(n=1, mode=(False, "rows", True), sizes=[5] * 5, budget=1000)
    job, coordinator = machine.job, machine.job.coordinator
    before, other = ShuffleKey(20, 5, 1), ShuffleKey(40, 5, 1)
    stood = Position(0, 10, fingerprint(0, 5), 3, shuffle=before, low=1)

    def arrive(
        reader: Reader, position: Position | None, key: ShuffleKey
    ) -> "asyncio.Future[Started | Failure]":
        stream, lifeline = Stream(reader.name, 1), reader.lifeline
        arriving = asyncio.ensure_future(
            coordinator.start_epoch((0, stream, lifeline, position, key, 0, COUNTERS)),
            loop=job.loop,
        )
        job.loop.run_until_complete(asyncio.sleep(AT_ONCE_S))
        return arriving

    try:
        first = job.readers[0]
        arrive(first, stood, before)
        assert coordinator._runner.epochs.phase is Phase.STARTING
        death = coordinator.report_death((0, Stream(first.name, 1)))
        job.loop.run_until_complete(death)
        arriving = arrive(job.spawn(0), None, other)
        job.loop.run_until_complete(arriving)
        started = arriving.result()
        assert isinstance(started, Started)
        assert started.position == Position(0, shuffle=other)
    finally:
        machine.job.close()
        machine.fakes.close()


# Many runs in one: the bound of a single test would be too short for the longer profiles, and
# coverage makes them several times slower.
TestProtocol = pytest.mark.no_cover(pytest.mark.timeout(3600)(ProtocolMachine.TestCase))
TestProtocol.settings = settings(stateful_step_count=30)
