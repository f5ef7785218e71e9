"""Every metric, defined once: collector, reference, dashboards and rules are made from this table.

``python -m asyncsplit.telemetry.catalog > docs/metrics.md`` writes the reference.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import ray

import asyncsplit
from asyncsplit.telemetry.state import ConsumerCounters, CoordinatorState

MAX_SPLIT_LABELS = 64
"""Splits that get series of their own. A scrape takes some 5 microseconds for each series, in which
the event loop cannot run: 2 ms in all at 64 splits, 35 ms at 1,024."""


class Snapshot(NamedTuple):
    """What one scrape reads, so that all metrics in it tell of the same moment."""

    state: CoordinatorState
    delivered: tuple[tuple[str, ConsumerCounters], ...]
    """Totals by value of the ``split`` label; above `MAX_SPLIT_LABELS` one, of all splits."""

    @classmethod
    def of(cls, state: CoordinatorState) -> "Snapshot":
        """Read the totals of a state that other threads go on changing."""
        if len(state.splits) > MAX_SPLIT_LABELS:
            # To Prometheus an empty label is an absent one, so that sums come out alike.
            return cls(state, (("", state.delivered),))
        totals = ((str(split), each.total) for split, each in enumerate(state.splits))
        return cls(state, tuple(totals))


Samples = Iterable[tuple[tuple[str, ...], float]]
"""Label values, in the order of the metric's labels, and what was counted or measured."""


@dataclass(frozen=True)
class Metric:
    """A metric: what it is called, what it means and where its samples come from."""

    name: str
    kind: Literal["counter", "gauge"]
    unit: Literal["", "bytes", "seconds"]
    """Empty if the name says what is counted."""
    labels: tuple[str, ...]
    help: str
    read: Callable[[Snapshot], Samples]


def _whole(value: Callable[[CoordinatorState], float]) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [((snapshot.state.name,), value(snapshot.state))]


def _keyed(
    values: Callable[[CoordinatorState], Mapping[str, float]],
) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [
        ((snapshot.state.name, key), value) for key, value in tuple(values(snapshot.state).items())
    ]


def _delivered(value: Callable[[ConsumerCounters], float]) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [
        ((snapshot.state.name, split), value(total)) for split, total in snapshot.delivered
    ]


_DATASET = ("dataset",)
_SPLIT = ("dataset", "split")

CATALOG = (
    Metric(
        "asyncsplit_build_info",
        "gauge",
        "",
        ("version", "ray_version"),
        "Always 1; the labels name the versions of asyncsplit and of Ray.",
        lambda _: [((asyncsplit.__version__, ray.__version__), 1)],
    ),
    Metric(
        "asyncsplit_splits",
        "gauge",
        "",
        _DATASET,
        "Splits of the dataset.",
        _whole(lambda state: len(state.splits)),
    ),
    Metric(
        "asyncsplit_rows_total",
        "counter",
        "",
        _SPLIT,
        "Rows handed to training loops.",
        _delivered(lambda total: total.rows),
    ),
    Metric(
        "asyncsplit_batches_total",
        "counter",
        "",
        _SPLIT,
        "Batches handed to training loops.",
        _delivered(lambda total: total.batches),
    ),
    Metric(
        "asyncsplit_blocks_total",
        "counter",
        "",
        _SPLIT,
        "Blocks, or parts of blocks, that consumers have begun.",
        _delivered(lambda total: total.blocks),
    ),
    Metric(
        "asyncsplit_bytes_total",
        "counter",
        "bytes",
        _SPLIT,
        "Bytes of those blocks.",
        _delivered(lambda total: total.bytes),
    ),
    Metric(
        "asyncsplit_waited_batches_total",
        "counter",
        "",
        _SPLIT,
        "Batches that were not ready when the training loop asked for them.",
        _delivered(lambda total: total.waits),
    ),
    Metric(
        "asyncsplit_wait_seconds_total",
        "counter",
        "seconds",
        _SPLIT,
        "Seconds training loops waited for batches: the data stall.",
        _delivered(lambda total: total.wait_s),
    ),
    Metric(
        "asyncsplit_stream_seconds_total",
        "counter",
        "seconds",
        _SPLIT,
        "Seconds training loops spent iterating, waiting and training alike.",
        _delivered(lambda total: total.stream_s),
    ),
    Metric(
        "asyncsplit_epochs_total",
        "counter",
        "",
        ("dataset", "outcome"),
        "Epochs ended: completed by all splits, stopped because all left it early, or failed.",
        _keyed(lambda state: state.epochs),
    ),
    Metric(
        "asyncsplit_truncated_rows_total",
        "counter",
        "",
        _DATASET,
        "Rows nobody got: left over for equal shares, or for splits that left early.",
        _whole(lambda state: state.truncated_rows),
    ),
    Metric(
        "asyncsplit_consumer_conflicts_total",
        "counter",
        "",
        _DATASET,
        "Consumers sent away because another one held their split.",
        _whole(lambda state: state.conflicts),
    ),
    Metric(
        "asyncsplit_iterator_size_bytes",
        "gauge",
        "bytes",
        _DATASET,
        "Pickled size of the iterator that came to a consumer last; 0 before one came.",
        _whole(lambda state: state.serialized_bytes),
    ),
    Metric(
        "asyncsplit_iterator_serialized_bytes_total",
        "counter",
        "bytes",
        _DATASET,
        "Bytes of all iterators that came to consumers pickled.",
        _whole(lambda state: state.serialized_bytes_total),
    ),
    Metric(
        "asyncsplit_iterator_serializations_total",
        "counter",
        "",
        _DATASET,
        "Iterators that came to consumers pickled.",
        _whole(lambda state: state.serializations),
    ),
    Metric(
        "asyncsplit_schema_cache_requests_total",
        "counter",
        "",
        ("dataset", "result"),
        "Requests for the schema: hit in the cache, miss and computed, observed in the running"
        " epoch, or rejected because the dataset was being executed.",
        _keyed(lambda state: state.schema_requests),
    ),
    Metric(
        "asyncsplit_guard_rejections_total",
        "counter",
        "",
        ("dataset", "operation"),
        "Operations rejected because they would have started a second executor.",
        _keyed(lambda state: state.guard_rejections),
    ),
    Metric(
        "asyncsplit_guard_lock_seconds_total",
        "counter",
        "seconds",
        _DATASET,
        "Seconds under the lock that executor starts and schema requests share.",
        _whole(lambda state: state.guard_lock_s),
    ),
)


def markdown() -> str:
    """Return the reference of all metrics, as kept in docs/metrics.md."""
    rows = (
        f"| `{metric.name}` | {metric.kind} | {metric.unit}"
        f" | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |"
        for metric in CATALOG
    )
    return f"""\
# Metrics

<!-- Generated by `python -m asyncsplit.telemetry.catalog > docs/metrics.md`. -->

Each coordinator serves its metrics in the text formats of Prometheus and OpenMetrics.
`await it.metrics_url()` says where; `SplitOptions(telemetry=TelemetryConfig(...))` sets the address
or turns the endpoint off. Counters begin at 0 with the coordinator; every series is there from then
on.

`dataset` is the name given with `Dataset.set_name`, or `dataset`. `split` is the index of a split;
with more than {MAX_SPLIT_LABELS} splits it is empty, and one series counts for all of them.

| Metric | Type | Unit | Labels | Meaning |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    print(markdown(), end="")
