"""Plain numbers: what the hot path adds to, and what every way out reads.

Consumers count for themselves and send their totals with each message; totals are cumulative,
so a repeated or late message cannot count anything twice.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


class ConsumerCounters(NamedTuple):
    """A consumer's totals since it was created, over all its streams."""

    rows: int = 0
    batches: int = 0
    blocks: int = 0
    bytes: int = 0
    waits: int = 0
    """Batches that were not ready when the loop asked for them."""
    wait_s: float = 0.0
    """Seconds the loop waited for those."""
    stream_s: float = 0.0
    """Seconds from asking for a stream's first batch to its end: waiting and training."""

    def plus(self, other: "ConsumerCounters") -> "ConsumerCounters":
        """Add field by field."""
        return ConsumerCounters._make(a + b for a, b in zip(self, other, strict=True))

    def minus(self, other: "ConsumerCounters") -> "ConsumerCounters":
        """Subtract field by field."""
        return ConsumerCounters._make(a - b for a, b in zip(self, other, strict=True))


_NOTHING = ConsumerCounters()


@dataclass(slots=True)
class SplitState:
    """One split's totals, over all the consumers it has had."""

    consumer: str | None = None
    latest: ConsumerCounters = _NOTHING
    """The consumer's own totals, as last heard."""
    total: ConsumerCounters = _NOTHING
    """Everything delivered for this split. One value, replaced at once: were it a sum of two, a
    scrape between their changes would see it jump, and Prometheus take that for a restart."""


@dataclass(slots=True)
class CoordinatorState:
    """What one coordinator knows; a scrape reads it from another thread, without a lock."""

    dataset: str
    splits: list[SplitState]
    name: str = "dataset"
    """What the user calls the dataset: a label must not change from run to run, as ids do."""
    serialized_bytes: int = 0
    """Pickled size of the iterator a consumer brought last; 0 until one came."""
    serialized_bytes_total: int = 0
    serializations: int = 0
    schema_requests: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("hit", "miss", "observed", "rejected"), 0)
    )
    guard_rejections: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("schema",), 0))
    guard_lock_s: float = 0.0
    epochs: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("completed", "stopped", "failed"), 0)
    )
    truncated_rows: int = 0
    conflicts: int = 0

    @classmethod
    def of(cls, dataset: str, n: int, name: str | None = None) -> "CoordinatorState":
        """Return the state of a coordinator of ``n`` splits, all zero."""
        return cls(dataset, [SplitState() for _ in range(n)], name or "dataset")

    def meet(
        self,
        split: int,
        consumer: str,
        serialized_bytes: int,
        counters: ConsumerCounters = _NOTHING,
    ) -> None:
        """Note a split's consumer, and the size of its iterator if it was pickled.

        ``counters`` are its totals so far, which are not this coordinator's to count: of streams
        before another consumer had the split, or before the coordinator was restarted.
        """
        state = self.splits[split]
        if state.consumer == consumer:
            return
        state.consumer, state.latest = consumer, ConsumerCounters(*counters)
        if serialized_bytes and state.latest == _NOTHING:
            self.serialized_bytes = serialized_bytes
            self.serialized_bytes_total += serialized_bytes
            self.serializations += 1

    def update(self, split: int, consumer: str, counters: ConsumerCounters) -> None:
        """Take a consumer's totals; late messages and strangers' change nothing."""
        state = self.splits[split]
        counters = ConsumerCounters(*counters)
        if state.consumer == consumer and counters >= state.latest:
            state.total = state.total.plus(counters.minus(state.latest))
            state.latest = counters

    @property
    def delivered(self) -> ConsumerCounters:
        """Totals over all splits."""
        totals = zip(*(split.total for split in self.splits), strict=True)
        return ConsumerCounters._make(map(sum, totals))
