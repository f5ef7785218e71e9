"""Every span and every attribute, defined once: recorder and reference are made from this table."""

from dataclasses import dataclass
from typing import Literal

LONG_S = 0.1
"""From how long on a wait or a pull gets a span of its own, at first: see `Longest`."""


@dataclass(frozen=True)
class Attribute:
    """An attribute of spans; its name stays the same for ever, since searches name it."""

    name: str
    kind: Literal["string", "int", "double", "boolean"]
    help: str


DATASET = Attribute(
    "asyncsplit.dataset", "string", "Name of the dataset, as in the label `dataset` of metrics"
)
SPLITS = Attribute("asyncsplit.splits", "int", "How many splits there are")
SPLIT = Attribute("asyncsplit.split", "int", "Index of the split")
EPOCH = Attribute("asyncsplit.epoch", "int", "Number of the epoch")
OUTCOME = Attribute(
    "asyncsplit.outcome",
    "string",
    "How an epoch ended (`completed`, `stopped` or `failed`), or a stream (`completed`, `left` or"
    " `failed`)",
)
ROWS = Attribute(
    "asyncsplit.rows", "int", "Rows committed in the epoch, or handed out by the stream"
)
BATCHES = Attribute("asyncsplit.batches", "int", "Batches handed out by the stream")
WAIT = Attribute("asyncsplit.wait_seconds", "double", "Seconds the stream's loop waited in all")
CAUSE = Attribute(
    "asyncsplit.cause",
    "string",
    "What the loop waited for longest: `barrier`, `data`, `transfer` or `conversion`",
)
SLICES = Attribute("asyncsplit.slices", "int", "Slices delivered")
LAST_SPLIT = Attribute("asyncsplit.last_split", "int", "The split that arrived last")
AHEAD = Attribute(
    "asyncsplit.ahead", "boolean", "Whether the executor was started before the barrier opened"
)
REASON = Attribute(
    "asyncsplit.reason", "string", "Why it was needed: `consumer_died` or `coordinator_restarted`"
)
DURING_EXECUTION = Attribute(
    "asyncsplit.during_execution", "string", "The argument of `schema()`: see there"
)


@dataclass(frozen=True)
class SpanType:
    """A kind of span: what it is called, where it is recorded, and what it covers."""

    name: str
    process: Literal["coordinator", "consumer", "both"]
    parent: str
    help: str
    attributes: tuple[Attribute, ...]


EPOCH_SPAN = SpanType(
    "asyncsplit.epoch",
    "coordinator",
    "the span in which `streaming_split` was called; else the loop's of whoever arrived first",
    "From the first arrival at the barrier to the epoch's end",
    (DATASET, SPLITS, EPOCH, OUTCOME, ROWS),
)
BARRIER_SPAN = SpanType(
    "asyncsplit.barrier",
    "coordinator",
    "`asyncsplit.epoch`",
    "From the first arrival to the last, or until they gave up. Arrivals are events, of many the"
    " last ones",
    (DATASET, EPOCH, LAST_SPLIT),
)
START_SPAN = SpanType(
    "asyncsplit.executor_start",
    "coordinator",
    "`asyncsplit.epoch`",
    "The start of the dataset's executor",
    (DATASET, EPOCH, AHEAD),
)
STREAM_SPAN = SpanType(
    "asyncsplit.stream",
    "consumer",
    "the loop's span if that is in the epoch's trace; else `asyncsplit.epoch`, with a link to the"
    " loop's",
    "From asking for the first batch to the end of the loop",
    (DATASET, SPLIT, EPOCH, OUTCOME, ROWS, BATCHES, WAIT),
)
WAIT_SPAN = SpanType(
    "asyncsplit.wait",
    "consumer",
    "`asyncsplit.stream`",
    "A long wait of the loop for a batch",
    (DATASET, SPLIT, EPOCH, CAUSE),
)
PULL_SPAN = SpanType(
    "asyncsplit.pull",
    "coordinator",
    "`asyncsplit.stream`",
    "A request for blocks that waited long in the coordinator, or failed",
    (DATASET, SPLIT, EPOCH, SLICES),
)
REJOIN_SPAN = SpanType(
    "asyncsplit.rejoin",
    "both",
    "`asyncsplit.epoch` for a consumer that died, else `asyncsplit.stream`",
    "From the news that a consumer has died to its replacement's arrival; or from the news that"
    " the coordinator was restarted to the epoch's going on",
    (DATASET, SPLIT, EPOCH, REASON),
)
SCHEMA_SPAN = SpanType(
    "asyncsplit.schema",
    "consumer",
    "the caller's span",
    "A call of `schema()`",
    (DATASET, DURING_EXECUTION),
)
SCHEMA_ANSWER_SPAN = SpanType(
    "asyncsplit.schema_answer",
    "coordinator",
    "`asyncsplit.schema`",
    "What the coordinator does for it: waiting for the guard's lock included",
    (DATASET, DURING_EXECUTION),
)

SPANS = (
    EPOCH_SPAN,
    BARRIER_SPAN,
    START_SPAN,
    STREAM_SPAN,
    WAIT_SPAN,
    PULL_SPAN,
    REJOIN_SPAN,
    SCHEMA_SPAN,
    SCHEMA_ANSWER_SPAN,
)

ARRIVAL_EVENT = "asyncsplit.arrival"


class Longest:
    """Picks the long ones of any number of durations, so that there are never many.

    After each ``allowance`` durations picked, they have to be twice as long.
    """

    __slots__ = ("_allowance", "_left", "_threshold_s")

    def __init__(self, allowance: int, threshold_s: float = LONG_S) -> None:
        """Begin with those that are longer than the threshold."""
        self._allowance = self._left = allowance
        self._threshold_s = threshold_s

    def picks(self, seconds: float) -> bool:
        """Tell whether a duration is one of the long ones."""
        if seconds < self._threshold_s:
            return False
        self._left -= 1
        if not self._left:
            self._left = self._allowance
            self._threshold_s *= 2
        return True


def markdown() -> str:
    """Return the reference of all spans and attributes, a part of docs/metrics.md."""
    spans = (
        f"| `{span.name}` | {_PROCESSES[span.process]} | {span.parent} | {span.help}"
        f" | {', '.join(f'`{attribute.name}`' for attribute in span.attributes)} |"
        for span in SPANS
    )
    attributes = dict.fromkeys(attribute for span in SPANS for attribute in span.attributes)
    meanings = (f"| `{one.name}` | {one.kind} | {one.help} |" for one in attributes)
    return f"""\
## Spans

| Span | Recorded by | Parent | Covers | Attributes |
|---|---|---|---|---|
{chr(10).join(spans)}

| Attribute | Type | Meaning |
|---|---|---|
{chr(10).join(meanings)}

Events of `asyncsplit.barrier` are called `{ARRIVAL_EVENT}` and have the attribute `{SPLIT.name}`.
"""


_PROCESSES = {
    "coordinator": "coordinator",
    "consumer": "consumer",
    "both": "coordinator or consumer",
}
