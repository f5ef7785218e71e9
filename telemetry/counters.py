"""What a consumer counts, and what its loop does with its time.

It sends its totals with each message. They are cumulative, so a repeated or late message cannot
count anything twice.
"""

from bisect import bisect_left
from collections.abc import Callable
from operator import add, sub
from typing import Any, Literal, NamedTuple

from asyncsplit.telemetry import catalog


class Exemplar(NamedTuple):
    """A wait that stands for those of its bucket, and where it is in a trace."""

    bucket: int
    trace_id: str
    span_id: str
    seconds: float
    at: float
    """Seconds since 1970."""


class ConsumerCounters(NamedTuple):
    """A consumer's totals since it was created, over all its streams; and, last, its present."""

    rows: int = 0
    batches: int = 0
    blocks: int = 0
    bytes: int = 0
    waits: int = 0
    """Batches that were not ready when the loop asked for them."""
    wait_s: float = 0.0
    """Seconds the loop waited, for those and for the end of a stream."""
    stream_s: float = 0.0
    """Seconds from asking for a stream's first batch to its end: waiting and training."""
    barrier_s: float = 0.0
    """Seconds of the wait in which the epoch had not started."""
    data_s: float = 0.0
    """Seconds of the wait in which the coordinator had no block."""
    transfer_s: float = 0.0
    """Seconds of the wait in which a block was on its way from another process."""
    firsts: int = 0
    """Streams that have got their first batch."""
    first_s: float = 0.0
    """Seconds from the news that the epoch has started to the first batch, of those streams."""
    local_blocks: int = 0
    """Blocks that were produced on the consumer's node."""
    remote_blocks: int = 0
    """Blocks that were produced on another node."""
    waited: tuple[int, ...] = (0,) * (len(catalog.WAIT_BOUNDS) + 1)
    """How many waits were how long, see `catalog.WAIT_BOUNDS`."""
    backlog_bytes: int = 0
    """Bytes of the blocks delivered and not begun, now."""
    lag_s: float = 0.0
    """The longest that the consumer's event loop was busy elsewhere, since its last message."""
    exemplars: tuple[Exemplar, ...] = ()
    """Of waits since its last message, if traces are recorded."""

    @property
    def busy_s(self) -> float:
        """Seconds its loops did not wait for data: they trained, or waited for conversions."""
        return self.stream_s - self.barrier_s - self.data_s - self.transfer_s

    def plus(self, other: "ConsumerCounters") -> "ConsumerCounters":
        """Add the totals; the present is the other's."""
        return _combine(add, self, other, present=other)

    def minus(self, other: "ConsumerCounters") -> "ConsumerCounters":
        """Subtract the totals; the present is this one's."""
        return _combine(sub, self, other, present=self)


NOTHING = ConsumerCounters()
_WAITED = ConsumerCounters._fields.index("waited")


def _combine(
    operator: Callable[[Any, Any], Any],
    one: ConsumerCounters,
    other: ConsumerCounters,
    *,
    present: ConsumerCounters,
) -> ConsumerCounters:
    totals: Any = map(operator, one[:_WAITED], other[:_WAITED])
    waited = tuple(map(operator, one.waited, other.waited))
    return ConsumerCounters._make((*totals, waited, *present[_WAITED + 1 :]))


class StreamTimes:
    """What one stream's consumer does with its time; seconds of any clock that moves forward."""

    __slots__ = (
        *("barrier_s", "began", "data_s", "exemplars", "first_s", "firsts", "lag_s"),
        *("started_at", "transfer_s", "wait_s", "waited", "waiting_since", "waits"),
    )

    def __init__(self, now: float) -> None:
        """Begin with the request for the first batch."""
        self.began = self.started_at = now
        self.waits = 0
        self.wait_s = self.barrier_s = self.data_s = self.transfer_s = 0.0
        self.firsts = 0
        self.first_s = 0.0
        self.waited = [0] * (len(catalog.WAIT_BOUNDS) + 1)
        self.lag_s = 0.0
        """The longest that other tasks took since it was read last."""
        self.exemplars: dict[int, Exemplar] = {}
        """The latest of each bucket since they were read last."""
        self.waiting_since: float | None = None

    @property
    def causes(self) -> dict[str, float]:
        """What has been waited for so far, as far as it is told apart."""
        return {"barrier": self.barrier_s, "data": self.data_s, "transfer": self.transfer_s}

    def wait(self, asked_at: float) -> None:
        """Note that the loop has to wait for what it asked for."""
        self.waiting_since = max(asked_at, self.began)

    def waited_for(
        self, cause: Literal["barrier", "data", "transfer", "conversion"], seconds: float
    ) -> None:
        """Note what the loop waited for; conversion is what is left of the wait."""
        if cause == "barrier":
            self.barrier_s += seconds
        elif cause == "data":
            self.data_s += seconds
        elif cause == "transfer":
            self.transfer_s += seconds

    def got(self, now: float, *, batch: bool) -> float:
        """Note that the wait brought a batch, or the end; return how long it was."""
        assert self.waiting_since is not None
        seconds = now - self.waiting_since
        self.waited[bisect_left(catalog.WAIT_BOUNDS, seconds)] += 1
        self.waits += batch
        if batch and not self.firsts:
            self.firsts = 1
            self.first_s = now - self.started_at
        return seconds

    def go_on(self, now: float) -> None:
        """Note that the loop waits no more, whatever it has got."""
        self.wait_s = self.wait_s_at(now)
        self.waiting_since = None

    def wait_s_at(self, now: float) -> float:
        """Return how long the loop has waited, the wait in progress included."""
        return self.wait_s + (0.0 if self.waiting_since is None else now - self.waiting_since)

    def totals(
        self,
        now: float,
        *,
        rows: int,
        batches: int,
        blocks: int,
        size_bytes: int,
        backlog_bytes: int,
        local_blocks: int = 0,
        remote_blocks: int = 0,
    ) -> ConsumerCounters:
        """Return what the consumer reports of the stream; the longest lag is of the time since."""
        lag_s, self.lag_s = self.lag_s, 0.0
        exemplars: tuple[Exemplar, ...] = ()
        if self.exemplars:
            exemplars = tuple(self.exemplars.values())
            self.exemplars.clear()
        return ConsumerCounters(
            rows,
            batches,
            blocks,
            size_bytes,
            self.waits,
            self.wait_s_at(now),
            now - self.began,
            self.barrier_s,
            self.data_s,
            self.transfer_s,
            self.firsts,
            self.first_s,
            local_blocks,
            remote_blocks,
            tuple(self.waited),
            backlog_bytes,
            lag_s,
            exemplars,
        )
