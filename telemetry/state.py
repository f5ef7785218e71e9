"""What a coordinator knows, in plain numbers: the hot path adds to them, every way out reads them.

Ages are not kept, but when something began: so they grow while nothing happens at all.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from asyncsplit.core.epochs import Epochs, Phase
from asyncsplit.core.ledger import Ledger
from asyncsplit.core.liveness import Liveness
from asyncsplit.core.routing import EqualRouter
from asyncsplit.telemetry import catalog
from asyncsplit.telemetry.counters import NOTHING, ConsumerCounters, Exemplar

if TYPE_CHECKING:
    from asyncsplit.distribution import Distribution
    from asyncsplit.wire import Delivery

STALL_WINDOW_S = 10.0
"""Of how many seconds of a consumer's iterating, at least, its stall ratio is."""

ExecutorState = Literal["idle", "starting", "running", "stopping"]


class Histogram:
    """Counts of observations, by the bucket of the catalog's bounds they fall into."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start with nothing observed."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count an observation."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Pumped(NamedTuple):
    """What the pump has done with its time; one value, so that it is read as of one moment."""

    dataset_s: float = 0.0
    consumers_s: float = 0.0
    blocked_on: Literal["dataset", "consumers"] | None = None
    since: float = 0.0
    """When that began."""

    def at(self, now: float) -> "Pumped":
        """Return the totals at a moment, what is going on included."""
        seconds = max(0.0, now - self.since)
        if self.blocked_on == "dataset":
            return self._replace(dataset_s=self.dataset_s + seconds)
        if self.blocked_on == "consumers":
            return self._replace(consumers_s=self.consumers_s + seconds)
        return self


class PumpClock:
    """Keeps the pump's time, over all epochs; one thread at a time writes."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        """Start with no pump at work."""
        self.value = Pumped()

    def blocked_on(self, what: Literal["dataset", "consumers"] | None) -> None:
        """Note what the pump is blocked on from now on; None if there is no pump."""
        now = time.monotonic()
        dataset_s, consumers_s, _, _ = self.value.at(now)
        self.value = Pumped(dataset_s, consumers_s, what, now)


@dataclass(slots=True)
class SplitState:
    """One split's totals, over all the consumers it has had, and when something began."""

    consumer: str | None = None
    latest: ConsumerCounters = NOTHING
    """The consumer's own totals, as last heard."""
    total: ConsumerCounters = NOTHING
    """Everything delivered for this split. One value, replaced at once: were it a sum of two, a
    scrape between their changes would see it jump, and Prometheus take that for a restart."""
    training_s: float = 0.0
    conversion_s: float = 0.0
    """Differences of totals. Rounding could let them fall, so their maximum is kept."""
    heard_at: float | None = None
    """When the consumer's last message came."""
    batch_at: float = 0.0
    """When a message came that told of another batch; or when the stream began."""
    start_s: float = 0.0
    """How long after the barrier had opened the news of that reached the consumer."""
    ready_since: int = 0
    """The consumer's batches when it was last known to have waited."""
    sent_seq: int = 0
    """Number of the first slice of the epoch that was never sent."""
    stall_ratio: float = 0.0
    window: ConsumerCounters = NOTHING
    """The totals at the beginning of the window of the next ratio."""

    @property
    def ready_batches(self) -> int:
        """Batches in a row that were ready, as far as messages tell."""
        return max(0, self.latest.batches - self.ready_since)

    def add(self, counters: ConsumerCounters) -> ConsumerCounters:
        """Take the consumer's totals; return what they are more than before."""
        more = counters.minus(self.latest)
        if more.waits:
            self.ready_since = counters.batches
        self.latest = counters
        self.total = total = self.total.plus(more)
        self.training_s = max(self.training_s, total.stream_s - total.wait_s)
        caused = total.barrier_s + total.data_s + total.transfer_s
        self.conversion_s = max(self.conversion_s, total.wait_s - caused)
        streamed = total.stream_s - self.window.stream_s
        if streamed >= STALL_WINDOW_S:
            self.stall_ratio = (total.wait_s - self.window.wait_s) / streamed
            self.window = total
        return more


@dataclass(slots=True)
class CoordinatorState:
    """What one coordinator knows; a scrape reads it from another thread, without a lock."""

    dataset: str
    splits: list[SplitState]
    name: str = "dataset"
    """What the user calls the dataset: a label must not change from run to run, as ids do."""
    started_at: float = field(default_factory=time.time)

    distribution: "Callable[[], Distribution] | None" = None
    """What the coordinator distributes now: not held, or its blocks would be kept."""
    ahead: "Callable[[], Distribution | None]" = lambda: None
    """The next epoch's, if that was started before its barrier has opened."""
    epochs_now: Epochs | None = None
    liveness: Liveness | None = None
    """The coordinator's own, only read here: numbers, and the members of sets and dicts."""
    arrived_at: Mapping[int, float] = field(default_factory=dict)
    """When splits came to the barrier the last time."""
    pump: PumpClock = field(default_factory=PumpClock)
    executor: ExecutorState = "idle"
    tick_due: float | None = None
    """When the event loop's timer is due; None if none is set."""

    serialized_bytes: int = 0
    """Pickled size of the iterator a consumer brought last; 0 until one came."""
    serialized_bytes_total: int = 0
    serializations: int = 0
    schema_requests: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("hit", "miss", "observed", "rejected"), 0)
    )
    guard_rejections: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("schema",), 0))
    guard_lock_s: float = 0.0
    guard_locks: int = 0
    guard_locked_at: float | None = None
    """Since when the guard's lock has been held."""
    arrivals: int = 0
    epochs: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("completed", "stopped", "failed"), 0)
    )
    opened_at: float | None = None
    """When the barrier of the epoch under way opened."""
    truncated_rows: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("equal", "left_early"), 0)
    )
    padded_rows: int = 0
    redelivered_rows: int = 0
    rejoins: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("consumer_died", "coordinator_restarted"), 0)
    )
    fenced: int = 0
    conflicts: int = 0
    deaths: int = 0
    lost: int = 0

    exemplars: dict[int, Exemplar] = field(default_factory=dict)
    """The latest wait for a batch of each bucket that has been traced."""

    barrier_wait: Histogram = field(default_factory=lambda: Histogram(catalog.BARRIER_BOUNDS))
    executor_start: Histogram = field(default_factory=lambda: Histogram(catalog.START_BOUNDS))
    first_batch: Histogram = field(default_factory=lambda: Histogram(catalog.START_BOUNDS))
    epoch_duration: Histogram = field(default_factory=lambda: Histogram(catalog.EPOCH_BOUNDS))
    loop_lag: Histogram = field(default_factory=lambda: Histogram(catalog.LAG_BOUNDS))

    @classmethod
    def of(
        cls,
        dataset: str,
        n: int,
        name: str | None = None,
        distribution: "Callable[[], Distribution] | None" = None,
    ) -> "CoordinatorState":
        """Return the state of a coordinator of ``n`` splits, all zero."""
        splits = [SplitState() for _ in range(n)]
        return cls(dataset, splits, name or "dataset", distribution=distribution)

    def watch(
        self,
        epochs: Epochs,
        liveness: Liveness,
        arrived_at: Mapping[int, float],
        ahead: "Callable[[], Distribution | None]" = lambda: None,
    ) -> None:
        """Read these, too, at each scrape."""
        self.epochs_now, self.liveness, self.arrived_at = epochs, liveness, arrived_at
        self.ahead = ahead

    @property
    def ledger(self) -> Ledger | None:
        """The ledger of the epoch under way."""
        return None if self.distribution is None else self.distribution().ledger

    @property
    def ledgers(self) -> list[Ledger]:
        """That, and the one of the next epoch, if it was started ahead."""
        ahead = self.ahead()
        present = [] if self.ledger is None else [self.ledger]
        return present if ahead is None else [*present, ahead.ledger]

    @property
    def pulled_at(self) -> Mapping[int, float]:
        """When the pulls came that wait for blocks."""
        return {} if self.distribution is None else self.distribution().waiting_since

    def meet(
        self,
        split: int,
        consumer: str,
        serialized_bytes: int,
        counters: ConsumerCounters = NOTHING,
    ) -> None:
        """Note a split's consumer, and the size of its iterator if it was pickled.

        ``counters`` are its totals so far, which are not this coordinator's to count: of streams
        before another consumer had the split, or before the coordinator was restarted.
        """
        state = self.splits[split]
        state.heard_at = time.monotonic()
        if state.consumer == consumer:
            return
        state.consumer, state.latest = consumer, counters
        state.ready_since = state.latest.batches
        if serialized_bytes and state.latest == NOTHING:
            self.serialized_bytes = serialized_bytes
            self.serialized_bytes_total += serialized_bytes
            self.serializations += 1

    def update(self, split: int, consumer: str, counters: ConsumerCounters) -> None:
        """Take a consumer's totals; late messages and strangers' change nothing."""
        state = self.splits[split]
        if state.consumer != consumer or counters < state.latest:
            return
        more = state.add(counters)
        self.exemplars.update((each[0], each) for each in counters.exemplars)
        state.heard_at = time.monotonic()
        if more.batches:
            state.batch_at = state.heard_at
        if more.firsts:
            self.first_batch.observe(state.start_s + more.first_s / more.firsts, more.firsts)

    def replace(self, split: int) -> None:
        """Note that a consumer goes on where another one died."""
        self.rejoins["consumer_died"] += 1
        state = self.splits[split]
        state.start_s, state.batch_at = 0.0, time.monotonic()

    def send(self, split: int, delivery: "Delivery") -> None:
        """Note what is sent to a split."""
        state = self.splits[split]
        if (again := state.sent_seq - delivery.cursor) > 0:
            rows = sum(part.stop - part.start for part in delivery.slices[:again])
            self.redelivered_rows += max(0, rows - delivery.skip_rows)
        state.sent_seq = max(state.sent_seq, delivery.cursor + len(delivery.slices))

    def epoch_opened(self) -> None:
        """Note that the barrier has opened."""
        self.opened_at = now = time.monotonic()
        active = () if self.epochs_now is None else self.epochs_now.reading
        first = min((self.arrived_at[split] for split in active), default=now)
        self.barrier_wait.observe(max(0.0, now - first))

    def epoch_started(self) -> None:
        """Note that the executor of the epoch has started."""
        now = time.monotonic()
        start_s = 0.0 if self.opened_at is None else now - self.opened_at
        self.executor_start.observe(start_s)
        for state in self.splits:
            state.start_s, state.batch_at, state.sent_seq = start_s, now, 0

    def epoch_ended(self, outcome: str) -> None:
        """Note how the epoch has ended, and what nobody got of it."""
        self.epochs[outcome] += 1
        if self.opened_at is not None:
            self.epoch_duration.observe(time.monotonic() - self.opened_at)
            self.opened_at = None
        if (ledger := self.ledger) is not None:
            equal = isinstance(ledger.router, EqualRouter)
            by_shares = ledger.router.truncated_rows if equal else 0
            self.truncated_rows["equal"] += by_shares
            self.truncated_rows["left_early"] += ledger.truncated_rows - by_shares
            self.padded_rows += ledger.router.padded_rows

    def tick_in(self, seconds: float) -> None:
        """Note that the event loop's timer is to come so soon."""
        self.tick_due = time.monotonic() + seconds

    def ticked(self) -> None:
        """Note that it has come."""
        if self.tick_due is not None:
            self.loop_lag.observe(max(0.0, time.monotonic() - self.tick_due))
        self.tick_due = None

    @property
    def delivered(self) -> ConsumerCounters:
        """Totals over all splits."""
        columns: Any = zip(*(split.total for split in self.splits), strict=True)
        *totals, waited, backlog, lag, _ = columns
        by_bucket = tuple(map(sum, zip(*waited, strict=True)))
        return ConsumerCounters._make((*map(sum, totals), by_bucket, sum(backlog), max(lag), ()))

    @property
    def is_running(self) -> bool:
        """Whether blocks are being delivered."""
        return self.epochs_now is not None and self.epochs_now.phase is Phase.RUNNING
