"""Distribution: one epoch's blocks on their way from the pump to the pulls that wait for them.

Which split gets what, and what is acknowledged, is decided by the ledger; this class feeds it
with what the executor puts out, wakes the pulls that something came for, and lets the pump take
as much as there is room for.
"""

import asyncio
from collections.abc import Callable, Iterable

from asyncsplit import engine
from asyncsplit.core.budget import is_short
from asyncsplit.core.leases import SplitLog
from asyncsplit.core.ledger import Ledger
from asyncsplit.core.progress import Progress
from asyncsplit.core.replay import Replay
from asyncsplit.core.routing import Part
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.errors import StateMismatchError
from asyncsplit.guard import Guard
from asyncsplit.pump import Pump
from asyncsplit.telemetry.counters import ConsumerCounters
from asyncsplit.telemetry.state import PumpClock
from asyncsplit.wire import Delivery, Slice

MAX_SLICES = 128
"""Slices in one reply. While Ray unpickles one, at 20 microseconds a slice, the consumer's loop
waits for the interpreter; fewer cost more messages."""


class Distribution:
    """The ledger of one epoch, what fills it and who waits for it."""

    def __init__(
        self, ledger: Ledger, guard: Guard, ended: "Callable[[Distribution], None]"
    ) -> None:
        """Prepare to distribute; ``ended`` is called when nothing more comes, whatever the reason.

        It is called once: with `error` set, or when the dataset is exhausted.
        """
        self.ledger = ledger
        self.error: BaseException | None = None
        """What ends the epoch for everybody."""
        self.waiting_since: dict[int, float] = {}
        """When the pulls began that wait now, by split; of those that came early, when not any
        more."""
        self.stopped = False
        """Whether the epoch was given up, or is over."""
        self._guard = guard
        self._ended = ended
        self._pump: Pump | None = None
        self._replays: list[Replay] = []
        self._pulls: dict[int, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def replay(self, replays: Iterable[Replay]) -> None:
        """Leave out what earlier runs with other numbers of splits have read."""
        self._replays = list(replays)

    def start(self, execution: engine.Execution, name: str, clock: PumpClock) -> None:
        """Begin to take blocks from an execution, on a thread of that name; not after `stop`."""
        if self.stopped:
            return
        self._pump = Pump(execution, self._receive, name, clock)
        self._settle()

    @property
    def paused(self) -> bool:
        """Whether it is the consumers who keep the execution from going on."""
        return self._pump is not None and not self._pump.wanting

    def stop(self) -> Callable[[], None]:
        """Take no more blocks, and send all pulls home.

        Returns:
            What blocks until the execution is used no more: soon after its shutdown.
        """
        self.stopped = True
        self._set_timer(None)
        for split in self._pulls:
            self._wake(split)
        # The pump holds this object: were it held in turn, blocks would be kept until the garbage
        # is collected.
        pump, self._pump = self._pump, None
        if pump is None:
            return lambda: None
        pump.stop()
        return pump.join

    def read(self, split: int, cursor: int | None) -> Delivery:
        """Return the slices there are from ``cursor`` on.

        Without a cursor they are those from the first row that is not committed.
        """
        log = self.ledger.logs[split]
        begin = log.first_seq if cursor is None else cursor
        exhausted = self.ledger.exhausted(split)
        if begin > log.next_seq and not exhausted:
            # What a consumer has had before a restart is still being produced again.
            return Delivery(begin, (), end=False)
        slices = tuple(
            Slice(part.block, part.start, part.stop, part.size_bytes, part.padding, part.node)  # type: ignore[arg-type]
            for _, part, _ in log.read(begin, max_leases=MAX_SLICES)
        )
        end = begin + len(slices) == log.next_seq and exhausted
        if cursor is not None:
            return Delivery(begin, slices, end)
        skipped = tuple(log.skipped) if log.shuffle else ()
        return Delivery(begin, slices, end, log.skip_rows, log.check, skipped)

    async def news(self, split: int, now: float | None) -> bool:
        """Return when it is worth reading the split again; False for whom a newer pull replaces.

        ``now`` is when the wait begins, None if nobody's loop waits.
        """
        self._wake(split)
        waiting = self._pulls[split] = asyncio.get_running_loop().create_future()
        if now is not None:
            self.waiting_since[split] = max(now, self.ledger.held_until(split))
        try:
            await waiting
        finally:
            if newest := self._pulls.get(split) is waiting:
                del self._pulls[split]
                self.waiting_since.pop(split, None)
        return newest

    def ask(self, split: int, rows_ahead: int, counters: ConsumerCounters) -> None:
        """Note what a consumer has ahead, and how fast it is, for the next `acknowledge`."""
        now = asyncio.get_running_loop().time()
        self.ledger.ask(split, rows_ahead, counters.rows, counters.busy_s, now)

    def acknowledge(self, split: int, progress: Progress) -> None:
        """Commit what a consumer has finished with, and fill the room it has made."""
        self.ledger.acknowledge(split, progress.rows, fed=progress.fed, low=progress.low)
        self._settle()

    def is_through(self, split: int) -> bool:
        """Tell whether all of a split is committed, and nothing more comes."""
        return self.ledger.exhausted(split) and not self.ledger.logs[split].leased_rows

    def take_over(self, split: int, shuffle: ShuffleKey | None) -> SplitLog:
        """Let a new consumer begin where a split's dead one had come to."""
        self.ledger.rewind(split, shuffle)
        self._settle()
        return self.ledger.logs[split]

    def leave(self, split: int) -> None:
        """Let a split's consumer go: it takes no more."""
        self.ledger.leave(split)
        self._wake(split)
        self._settle()

    def _receive(self, bundles: list[engine.Bundle], end: BaseException | None) -> None:
        """Take what the pump brings: on the loop, between two awaits of everything else."""
        for bundle in bundles:
            self._guard.observe(bundle.schema)
        try:
            self._produce(
                Part(block.ref, block.start, block.stop, block.size_bytes, block.node_id)
                for bundle in bundles
                for block in bundle.blocks
                if block.stop > block.start
            )
            if isinstance(end, StopIteration):
                while self._replays:
                    self._produce(self._replays.pop(0).finish())
        except StateMismatchError as error:
            self._fail(error)
            return
        if isinstance(end, StopIteration):
            self.ledger.finish()
            self._guard.exhausted()
        elif end is not None:
            self._fail(self._guard.failure(end))
            return
        self._settle()
        if self.ledger.finished and self.error is None:
            self._ended(self)

    def _produce(self, parts: Iterable[Part]) -> None:
        for replay in self._replays:
            parts = replay.rest(parts)
        self.ledger.produce(parts)

    def _settle(self) -> None:
        """Assign what can be assigned, wake who got something, and renew the pump's credit."""
        try:
            got = self.ledger.route(asyncio.get_running_loop().time())
        except StateMismatchError as error:
            self._fail(error)
            return
        for split in got.union(filter(self.ledger.exhausted, self._pulls)):
            self._wake(split)
        self._set_timer(self.ledger.route_at)
        if self._pump is not None and not self.ledger.finished:
            credit = self.ledger.credit()
            self._pump.allow(credit)
            wanting = is_short(credit, self.ledger.budget_bytes)
            self._guard.report_consumers(self.ledger.held_bytes, wanting=wanting)

    def _set_timer(self, at: float | None) -> None:
        """Route at that time, if nothing happens before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if at is not None and not self.stopped:
            self._timer = asyncio.get_running_loop().call_at(at, self._settle)

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self._ended(self)

    def _wake(self, split: int) -> None:
        waiting = self._pulls.get(split)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
