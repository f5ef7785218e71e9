"""Every metric, defined once: collector, reference, dashboards and rules are made from this table.

``python -m asyncsplit.telemetry.catalog > docs/metrics.md`` writes the reference.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import ray

import asyncsplit
from asyncsplit.core.epochs import Phase
from asyncsplit.telemetry import spans

if TYPE_CHECKING:  # at run time it is the state that needs the bounds
    from asyncsplit.telemetry.counters import ConsumerCounters, Exemplar
    from asyncsplit.telemetry.state import CoordinatorState, Histogram, SplitState

MAX_SPLIT_LABELS = 64
"""Splits that get series of their own: each series takes some 5 microseconds of a scrape."""

WORST = 8
"""Splits that a gauge tells of if there are more than that."""

WAIT_BOUNDS: tuple[float, ...] = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0)
START_BOUNDS: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BARRIER_BOUNDS: tuple[float, ...] = (0.01, 0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0)
EPOCH_BOUNDS: tuple[float, ...] = (
    1.0,
    5.0,
    15.0,
    60.0,
    300.0,
    900.0,
    3600.0,
    14_400.0,
    43_200.0,
    86_400.0,
)
LAG_BOUNDS: tuple[float, ...] = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0)


class Snapshot(NamedTuple):
    """What one scrape reads, so that all metrics in it tell of the same moment."""

    state: "CoordinatorState"
    now: float
    """Seconds of `time.monotonic`."""
    delivered: "tuple[tuple[str, Delivered], ...]"
    """By value of the ``split`` label; above `MAX_SPLIT_LABELS` one, of all splits."""
    total: "Delivered"
    """Of all splits."""

    @classmethod
    def of(cls, state: "CoordinatorState") -> "Snapshot":
        """Read the totals of a state that other threads go on changing."""
        total = Delivered(
            state.delivered,
            sum(split.training_s for split in state.splits),
            sum(split.conversion_s for split in state.splits),
        )
        if len(state.splits) > MAX_SPLIT_LABELS:
            # To Prometheus an empty label is an absent one, so that sums come out alike.
            return cls(state, time.monotonic(), (("", total),), total)
        each = (
            (str(split), Delivered(each.total, each.training_s, each.conversion_s))
            for split, each in enumerate(state.splits)
        )
        return cls(state, time.monotonic(), tuple(each), total)


class Delivered(NamedTuple):
    """What was delivered to one split, or to all."""

    counters: "ConsumerCounters"
    training_s: float
    conversion_s: float


class Observed(NamedTuple):
    """What a histogram shows: observations in each bucket, and their sum."""

    counts: tuple[int, ...]
    """One more than there are bounds; not cumulative."""
    total: float
    exemplars: "Mapping[int, Exemplar] | None" = None
    """By bucket, if some observations can be found in a trace."""


Value: TypeAlias = float | Observed
Samples: TypeAlias = Iterable[tuple[tuple[str, ...], Value]]
"""Label values, in the order of the metric's labels, and what was counted or measured."""

Board: TypeAlias = Literal["overview", "coordinator", "splits"]


@dataclass(frozen=True)
class Metric:
    """A metric: what it is called, what it means, where it is shown and where it comes from."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: Literal["", "bytes", "seconds", "ratio"]
    """Empty if the name says what is counted."""
    labels: tuple[str, ...]
    help: str
    board: Board
    panel: str
    """Title of the panel on that board."""
    read: Callable[[Snapshot], Samples]
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, but for the last, which has none."""
    over_splits: Literal["sum", "max", "min"] = "sum"
    """What makes one number of several splits'."""


def _whole(value: "Callable[[CoordinatorState], float]") -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [((snapshot.state.name,), value(snapshot.state))]


def _age(since: "Callable[[CoordinatorState], float | None]") -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [((snapshot.state.name,), _since(since(snapshot.state), snapshot.now))]


def _keyed(
    values: Callable[[Snapshot], Mapping[str, float]],
) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [
        ((snapshot.state.name, key), value) for key, value in tuple(values(snapshot).items())
    ]


def _delivered(value: Callable[[Delivered], float]) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [
        ((snapshot.state.name, split), value(total)) for split, total in snapshot.delivered
    ]


def _histogram(of: "Callable[[CoordinatorState], Histogram]") -> Callable[[Snapshot], Samples]:
    def read(snapshot: Snapshot) -> Samples:
        observed = of(snapshot.state)
        yield (snapshot.state.name,), Observed(tuple(observed.counts), observed.total)

    return read


def _splits(
    values: Callable[[Snapshot], Iterable[float]],
    pick: Callable[..., Iterable[tuple[float, int]]] = heapq.nlargest,
) -> Callable[[Snapshot], Samples]:
    """Read one value of each split; of many splits, the worst."""

    def read(snapshot: Snapshot) -> Samples:
        by_split = [(value, split) for split, value in enumerate(values(snapshot))]
        if len(by_split) > MAX_SPLIT_LABELS:
            by_split = list(pick(WORST, by_split))
        return [((snapshot.state.name, str(split)), value) for value, split in by_split]

    return read


def _each(value: "Callable[[SplitState], float]") -> Callable[[Snapshot], Iterable[float]]:
    return lambda snapshot: [value(split) for split in snapshot.state.splits]


def _since(began: float | None, now: float) -> float:
    return 0.0 if began is None else max(0.0, now - began)


def _batch_waits(snapshot: Snapshot) -> Samples:
    counters = snapshot.total.counters
    ready = max(0, counters.batches - counters.waits)  # which cost a consumer nothing to count
    first, *others = counters.waited
    counts = (first + ready, *others)
    exemplars = snapshot.state.exemplars
    yield (snapshot.state.name,), Observed(counts, counters.wait_s, dict(exemplars) or None)


def _stalls(snapshot: Snapshot) -> dict[str, float]:
    counters = snapshot.total.counters
    return {
        "barrier": counters.barrier_s,
        "data": counters.data_s,
        "transfer": counters.transfer_s,
        "conversion": snapshot.total.conversion_s,
    }


def _located(snapshot: Snapshot) -> dict[str, float]:
    counters = snapshot.total.counters
    local, remote = counters.local_blocks, counters.remote_blocks
    return {"local": local, "remote": remote, "unknown": counters.blocks - local - remote}


def _arrived(state: "CoordinatorState") -> set[int]:
    return set() if state.epochs_now is None else set(state.epochs_now.waiting)


def _active(state: "CoordinatorState") -> set[int]:
    return set() if state.epochs_now is None else set(state.epochs_now.reading)


def _barrier_since(state: "CoordinatorState") -> float | None:
    return min((state.arrived_at[split] for split in _arrived(state)), default=None)


def _missing(snapshot: Snapshot) -> list[float]:
    epochs, n = snapshot.state.epochs_now, len(snapshot.state.splits)
    if epochs is None or not epochs.waiting:
        return [0.0] * n
    return [float(split not in epochs.arrived) for split in range(n)]


def _dead(snapshot: Snapshot) -> list[float]:
    liveness = snapshot.state.liveness
    n = len(snapshot.state.splits)
    return [float(liveness is not None and liveness.is_dead(split)) for split in range(n)]


def _wait_ages(snapshot: Snapshot) -> dict[str, float]:
    state, now = snapshot.state, snapshot.now
    starting = state.epochs_now is not None and state.epochs_now.phase is Phase.STARTING
    pump = state.pump.value
    return {
        "barrier": _since(_barrier_since(state), now),
        "start": _since(state.opened_at if starting else None, now),
        "pull": _since(min(tuple(state.pulled_at.values()), default=None), now),
        "lock": _since(state.guard_locked_at, now),
        "dataset": _since(pump.since if pump.blocked_on == "dataset" else None, now),
        "consumers": _since(pump.since if pump.blocked_on == "consumers" else None, now),
        "loop": _since(state.tick_due, now),
    }


def _split_waits(snapshot: Snapshot) -> Iterable[float]:
    state = snapshot.state
    arrived, pulled_at = _arrived(state), state.pulled_at
    for split in range(len(state.splits)):
        since = state.arrived_at if split in arrived else pulled_at
        yield _since(since.get(split), snapshot.now)


def _batch_ages(snapshot: Snapshot) -> Iterable[float]:
    state = snapshot.state
    active = _active(state) if state.is_running else set()
    for number, split in enumerate(state.splits):
        yield _since(split.batch_at if number in active else None, snapshot.now)


def _silences(snapshot: Snapshot) -> Iterable[float]:
    state = snapshot.state
    waiting_since, missing = _barrier_since(state), _missing(snapshot)
    active = _active(state) if state.is_running else set()
    dead, pulled_at = _dead(snapshot), state.pulled_at
    for number, split in enumerate(state.splits):
        its_turn = dead[number] or missing[number] or (number in active and number not in pulled_at)
        began = waiting_since if split.heard_at is None else split.heard_at
        yield _since(began if its_turn else None, snapshot.now)


def _epoch_rows(snapshot: Snapshot) -> dict[str, float]:
    ledger = snapshot.state.ledger
    if ledger is None:
        return dict.fromkeys(("unassigned", "leased", "committed", "truncated"), 0)
    return {
        "unassigned": ledger.router.unassigned_rows,
        "leased": ledger.leased_rows,
        "committed": sum(ledger.committed_rows),
        "truncated": ledger.truncated_rows,
    }


def _waiting_bytes(snapshot: Snapshot) -> list[float]:
    ledger = snapshot.state.ledger
    if ledger is None:
        return [0] * len(snapshot.state.splits)
    return [log.waiting_bytes for log in ledger.logs]


def _committed(state: "CoordinatorState") -> list[int]:
    """Rows committed of each split that reads or has read the epoch to its end."""
    ledger = state.ledger
    if ledger is None or not state.is_running:
        return [0] * len(state.splits)
    furthest = max(log.committed_rows for log in ledger.logs)
    # Who has left early is not behind.
    return [furthest if log.left else log.committed_rows for log in ledger.logs]


def _behind(snapshot: Snapshot) -> list[float]:
    rows = _committed(snapshot.state)
    furthest = max(rows, default=0)
    return [furthest - one for one in rows]


def _skew(state: "CoordinatorState") -> float:
    rows = _committed(state)
    furthest = max(rows, default=0)
    return 1 - min(rows) / furthest if furthest else 0.0


def _one_of(keys: Iterable[str], key: str) -> dict[str, float]:
    return {one: float(one == key) for one in keys}


def _phase(state: "CoordinatorState") -> str:
    return (Phase.WAITING if state.epochs_now is None else state.epochs_now.phase).value


def _pumped(snapshot: Snapshot) -> dict[str, float]:
    pumped = snapshot.state.pump.value.at(snapshot.now)
    return {"dataset": pumped.dataset_s, "consumers": pumped.consumers_s}


_DATASET = ("dataset",)
_SPLIT = ("dataset", "split")
_LONG_STEP = (
    " A training step that takes long looks the same, as consumers speak between batches only."
)

CATALOG = (
    Metric(
        "asyncsplit_build_info",
        "gauge",
        "",
        ("version", "ray_version"),
        "Always 1; the labels name the versions of asyncsplit and of Ray.",
        "coordinator",
        "Versions",
        lambda _: [((asyncsplit.__version__, ray.__version__), 1)],
        over_splits="max",
    ),
    Metric(
        "asyncsplit_start_time_seconds",
        "gauge",
        "seconds",
        _DATASET,
        "When the coordinator's process began, since 1970; it changes when Ray restarts it.",
        "coordinator",
        "Up since",
        _whole(lambda state: state.started_at),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_splits",
        "gauge",
        "",
        _DATASET,
        "Splits of the dataset, or replicas of them, which all have numbers of their own.",
        "overview",
        "Splits",
        _whole(lambda state: len(state.splits)),
    ),
    Metric(
        "asyncsplit_rows_total",
        "counter",
        "",
        _SPLIT,
        "Rows handed to training loops.",
        "overview",
        "Rows per second",
        _delivered(lambda total: total.counters.rows),
    ),
    Metric(
        "asyncsplit_batches_total",
        "counter",
        "",
        _SPLIT,
        "Batches handed to training loops.",
        "splits",
        "Batches per second",
        _delivered(lambda total: total.counters.batches),
    ),
    Metric(
        "asyncsplit_blocks_total",
        "counter",
        "",
        _SPLIT,
        "Blocks, or parts of blocks, that consumers have begun.",
        "splits",
        "Blocks per second",
        _delivered(lambda total: total.counters.blocks),
    ),
    Metric(
        "asyncsplit_located_blocks_total",
        "counter",
        "",
        ("dataset", "location"),
        "Blocks, or parts of blocks, that consumers have begun, by where they were produced: on the"
        " consumer's node (local), on another one (remote), or it is unknown, as of blocks that a"
        " dataset holds itself.",
        "splits",
        "Blocks by location",
        _keyed(_located),
    ),
    Metric(
        "asyncsplit_bytes_total",
        "counter",
        "bytes",
        _SPLIT,
        "Bytes of those blocks.",
        "overview",
        "Bytes per second",
        _delivered(lambda total: total.counters.bytes),
    ),
    Metric(
        "asyncsplit_waited_batches_total",
        "counter",
        "",
        _SPLIT,
        "Batches that were not ready when the training loop asked for them.",
        "splits",
        "Share of batches that were not ready",
        _delivered(lambda total: total.counters.waits),
    ),
    Metric(
        "asyncsplit_wait_seconds_total",
        "counter",
        "seconds",
        _SPLIT,
        "Seconds training loops waited for batches: the data stall.",
        "overview",
        "Data stall",
        _delivered(lambda total: total.counters.wait_s),
    ),
    Metric(
        "asyncsplit_training_seconds_total",
        "counter",
        "seconds",
        _SPLIT,
        "Seconds training loops spent on batches, while iterating: what is not data stall.",
        "overview",
        "Data stall",
        _delivered(lambda total: total.training_s),
    ),
    Metric(
        "asyncsplit_stream_seconds_total",
        "counter",
        "seconds",
        _SPLIT,
        "Seconds training loops spent iterating, waiting and training alike.",
        "overview",
        "Data stall",
        _delivered(lambda total: total.counters.stream_s),
    ),
    Metric(
        "asyncsplit_stall_seconds_total",
        "counter",
        "seconds",
        ("dataset", "cause"),
        "Seconds of data stall of all splits, by what the loops waited for: the barrier (other"
        " splits, the executor's start, and up to 50 ms for its first blocks), data that the"
        " dataset had not produced or another split's budget held back, the transfer of blocks, or"
        " their conversion into batches.",
        "overview",
        "Data stall by cause",
        _keyed(_stalls),
    ),
    Metric(
        "asyncsplit_batch_wait_seconds",
        "histogram",
        "seconds",
        _DATASET,
        "How long training loops waited for each batch; those that were ready are in the first"
        " bucket.",
        "overview",
        "Wait per batch",
        _batch_waits,
        bounds=WAIT_BOUNDS,
    ),
    Metric(
        "asyncsplit_split_stall_ratio",
        "gauge",
        "ratio",
        _SPLIT,
        "Share of data stall in the latest ten seconds or more that the split's consumer has"
        " reported.",
        "splits",
        "Data stall by split",
        _splits(_each(lambda split: split.stall_ratio)),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_split_ready_batches",
        "gauge",
        "",
        _SPLIT,
        "Batches in a row that were ready when the loop asked for them, at least.",
        "splits",
        "Ready batches in a row",
        _splits(_each(lambda split: split.ready_batches), heapq.nsmallest),
        over_splits="min",
    ),
    Metric(
        "asyncsplit_split_batch_age_seconds",
        "gauge",
        "seconds",
        _SPLIT,
        "Seconds since the coordinator heard of a batch handed to the split's loop, or since the"
        " epoch began; grows while the loop waits, is stuck or dead, and is 0 if the split reads no"
        " epoch." + _LONG_STEP,
        "splits",
        "Seconds since the last batch",
        _splits(_batch_ages),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_split_silence_seconds",
        "gauge",
        "seconds",
        _SPLIT,
        "Seconds since the split's consumer was heard of, while it is its turn: it reads an epoch"
        " and has not asked for blocks it did not get, others wait for it at the barrier, or it is"
        " dead. It is 0 while the consumer itself waits." + _LONG_STEP,
        "splits",
        "Silence",
        _splits(_silences),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_split_wait_age_seconds",
        "gauge",
        "seconds",
        _SPLIT,
        "Seconds that the split's consumer has been waiting at the barrier, or a request of it for"
        " blocks, which it makes before it needs them.",
        "splits",
        "Waits in progress by split",
        _splits(_split_waits),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_split_missing",
        "gauge",
        "",
        _SPLIT,
        "1 if others wait at the barrier and this split has not arrived, else 0.",
        "overview",
        "Missing at the barrier",
        _splits(_missing),
    ),
    Metric(
        "asyncsplit_split_dead",
        "gauge",
        "",
        _SPLIT,
        "1 if the process of the split's consumer has died and no other has taken its place, else"
        " 0.",
        "splits",
        "Dead and not replaced",
        _splits(_dead),
    ),
    Metric(
        "asyncsplit_split_waiting_bytes",
        "gauge",
        "bytes",
        _SPLIT,
        "Bytes of blocks assigned to the split that its consumer has not begun, delivered or not.",
        "splits",
        "Bytes waiting",
        _splits(_waiting_bytes),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_split_prefetched_bytes",
        "gauge",
        "bytes",
        _SPLIT,
        "Those of them that the consumer had been told of when it was last heard of.",
        "splits",
        "Bytes waiting",
        _splits(_each(lambda split: split.latest.backlog_bytes)),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_prefetch_budget_bytes",
        "gauge",
        "bytes",
        _DATASET,
        "Bytes that may wait for each split, and one block more.",
        "splits",
        "Bytes waiting",
        _whole(lambda state: 0 if state.ledger is None else state.ledger.budget_bytes),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_split_behind_rows",
        "gauge",
        "",
        _SPLIT,
        "Rows of the epoch that the split has committed less than the one furthest ahead; 0 once it"
        " has left.",
        "splits",
        "Rows behind",
        _splits(_behind),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_skew_ratio",
        "gauge",
        "ratio",
        _DATASET,
        "How far the split with the fewest committed rows of the epoch is behind the one with the"
        " most, from 0 to 1.",
        "overview",
        "Skew between splits",
        _whole(_skew),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_split_loop_lag_seconds",
        "gauge",
        "seconds",
        _SPLIT,
        "The longest time for which the consumer's event loop was busy with other tasks between"
        " two batches, in what its last message tells of. 0 for a plain `for`.",
        "splits",
        "Event-loop lag of consumers",
        _splits(_each(lambda split: split.latest.lag_s)),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_wait_age_seconds",
        "gauge",
        "seconds",
        ("dataset", "wait"),
        "Age of the oldest wait in progress, 0 if there is none: of a consumer at the barrier, of"
        " all for the executor's start, of a pull for blocks, for whoever holds the guard's lock,"
        " of the pump for the dataset or for consumers to have room, or for the coordinator's event"
        " loop, whose timer is overdue.",
        "overview",
        "Waits in progress",
        _keyed(_wait_ages),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_barrier_arrivals_total",
        "counter",
        "",
        _DATASET,
        "Arrivals of consumers at the barrier.",
        "coordinator",
        "Barrier",
        _whole(lambda state: state.arrivals),
    ),
    Metric(
        "asyncsplit_barrier_missing_splits",
        "gauge",
        "",
        _DATASET,
        "Splits that others wait for at the barrier.",
        "overview",
        "Missing at the barrier",
        lambda snapshot: [((snapshot.state.name,), sum(_missing(snapshot)))],
    ),
    Metric(
        "asyncsplit_barrier_wait_seconds",
        "histogram",
        "seconds",
        _DATASET,
        "From the first arrival at the barrier to the last, of each epoch.",
        "coordinator",
        "Barrier",
        _histogram(lambda state: state.barrier_wait),
        bounds=BARRIER_BOUNDS,
    ),
    Metric(
        "asyncsplit_epochs_total",
        "counter",
        "",
        ("dataset", "outcome"),
        "Epochs ended: completed by all splits, stopped because all left it early, or failed.",
        "overview",
        "Epochs",
        _keyed(lambda snapshot: snapshot.state.epochs),
    ),
    Metric(
        "asyncsplit_epoch",
        "gauge",
        "",
        _DATASET,
        "Number of the epoch under way, or of the last one; -1 before the first.",
        "overview",
        "Epochs",
        _whole(lambda state: -1 if state.epochs_now is None else state.epochs_now.epoch),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_epoch_phase",
        "gauge",
        "",
        ("dataset", "phase"),
        "1 for what the coordinator is doing: waiting at the barrier, starting the executor, or"
        " running an epoch.",
        "overview",
        "Epochs",
        _keyed(lambda snapshot: _one_of((p.value for p in Phase), _phase(snapshot.state))),
    ),
    Metric(
        "asyncsplit_epoch_age_seconds",
        "gauge",
        "seconds",
        _DATASET,
        "Seconds since the barrier of the epoch under way opened; 0 if there is none.",
        "overview",
        "Epochs",
        _age(lambda state: state.opened_at),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_epoch_rows",
        "gauge",
        "",
        ("dataset", "state"),
        "Rows of the epoch under way that the dataset has produced, or that were added as padding,"
        " by where they are: unassigned, leased, committed or truncated.",
        "overview",
        "Rows of the epoch",
        _keyed(_epoch_rows),
    ),
    Metric(
        "asyncsplit_epoch_duration_seconds",
        "histogram",
        "seconds",
        _DATASET,
        "From the opening of an epoch's barrier to its end, whatever that was.",
        "coordinator",
        "Duration of epochs",
        _histogram(lambda state: state.epoch_duration),
        bounds=EPOCH_BOUNDS,
    ),
    Metric(
        "asyncsplit_first_batch_seconds",
        "histogram",
        "seconds",
        _DATASET,
        "From the opening of an epoch's barrier to the first batch of each split.",
        "overview",
        "Time to the first batch",
        _histogram(lambda state: state.first_batch),
        bounds=START_BOUNDS,
    ),
    Metric(
        "asyncsplit_executor_start_seconds",
        "histogram",
        "seconds",
        _DATASET,
        "From the opening of an epoch's barrier to the start of its executor.",
        "coordinator",
        "Executor",
        _histogram(lambda state: state.executor_start),
        bounds=START_BOUNDS,
    ),
    Metric(
        "asyncsplit_executor_state",
        "gauge",
        "",
        ("dataset", "state"),
        "1 for the state of the dataset's executor: idle, starting, running or stopping.",
        "coordinator",
        "Executor",
        _keyed(
            lambda snapshot: _one_of(
                ("idle", "starting", "running", "stopping"), snapshot.state.executor
            )
        ),
    ),
    Metric(
        "asyncsplit_pump_blocked_seconds_total",
        "counter",
        "seconds",
        ("dataset", "blocked_on"),
        "Seconds that the pump, which takes blocks from the executor, was blocked on the dataset"
        " (data is the bottleneck) or on consumers having room (training is). What goes on is"
        " counted, too.",
        "overview",
        "Bottleneck",
        _keyed(_pumped),
    ),
    Metric(
        "asyncsplit_leased_bytes",
        "gauge",
        "bytes",
        _DATASET,
        "Bytes of blocks assigned to splits and not wholly committed, also of the next epoch if it"
        " was started ahead.",
        "coordinator",
        "Bytes held",
        _whole(lambda state: sum(ledger.leased_bytes for ledger in state.ledgers)),
    ),
    Metric(
        "asyncsplit_unassigned_bytes",
        "gauge",
        "bytes",
        _DATASET,
        "Bytes of blocks taken from the executor and not assigned to a split, also of the next"
        " epoch if it was started ahead.",
        "coordinator",
        "Bytes held",
        _whole(lambda state: sum(each.router.unassigned_bytes for each in state.ledgers)),
    ),
    Metric(
        "asyncsplit_truncated_rows_total",
        "counter",
        "",
        ("dataset", "reason"),
        "Rows nobody got: left over for equal shares, or for splits that left early.",
        "coordinator",
        "Truncated and padded rows",
        _keyed(lambda snapshot: snapshot.state.truncated_rows),
    ),
    Metric(
        "asyncsplit_padded_rows_total",
        "counter",
        "",
        _DATASET,
        "Rows given a second time, to fill up splits that were short of the others' rows.",
        "coordinator",
        "Truncated and padded rows",
        _whole(lambda state: state.padded_rows),
    ),
    Metric(
        "asyncsplit_redelivered_rows_total",
        "counter",
        "",
        _DATASET,
        "Rows of blocks that were sent to a split again, after a loss.",
        "coordinator",
        "Losses",
        _whole(lambda state: state.redelivered_rows),
    ),
    Metric(
        "asyncsplit_rejoins_total",
        "counter",
        "",
        ("dataset", "reason"),
        "Consumers that went on in the middle of an epoch: in the place of one that died, or after"
        " a restart of the coordinator.",
        "coordinator",
        "Losses",
        _keyed(lambda snapshot: snapshot.state.rejoins),
    ),
    Metric(
        "asyncsplit_consumer_deaths_total",
        "counter",
        "",
        _DATASET,
        "Consumers whose process died while they read an epoch or waited for one.",
        "coordinator",
        "Losses",
        _whole(lambda state: state.deaths),
    ),
    Metric(
        "asyncsplit_consumers_lost_total",
        "counter",
        "",
        _DATASET,
        "Consumers that others have given up waiting for.",
        "coordinator",
        "Losses",
        _whole(lambda state: state.lost),
    ),
    Metric(
        "asyncsplit_fenced_messages_total",
        "counter",
        "",
        _DATASET,
        "Messages refused because their epoch was over for the sender, or another had its place.",
        "coordinator",
        "Losses",
        _whole(lambda state: state.fenced),
    ),
    Metric(
        "asyncsplit_consumer_conflicts_total",
        "counter",
        "",
        _DATASET,
        "Consumers sent away because another one held their split.",
        "coordinator",
        "Losses",
        _whole(lambda state: state.conflicts),
    ),
    Metric(
        "asyncsplit_loop_lag_seconds",
        "histogram",
        "seconds",
        _DATASET,
        "How late the timer of the coordinator's event loop came, once a second while consumers"
        " iterate.",
        "coordinator",
        "Event-loop lag",
        _histogram(lambda state: state.loop_lag),
        bounds=LAG_BOUNDS,
    ),
    Metric(
        "asyncsplit_iterator_size_bytes",
        "gauge",
        "bytes",
        _DATASET,
        "Pickled size of the iterator that came to a consumer last; 0 before one came.",
        "coordinator",
        "Serialized iterator",
        _whole(lambda state: state.serialized_bytes),
        over_splits="max",
    ),
    Metric(
        "asyncsplit_iterator_serialized_bytes_total",
        "counter",
        "bytes",
        _DATASET,
        "Bytes of all iterators that came to consumers pickled.",
        "coordinator",
        "Serialized iterator",
        _whole(lambda state: state.serialized_bytes_total),
    ),
    Metric(
        "asyncsplit_iterator_serializations_total",
        "counter",
        "",
        _DATASET,
        "Iterators that came to consumers pickled.",
        "coordinator",
        "Serialized iterator",
        _whole(lambda state: state.serializations),
    ),
    Metric(
        "asyncsplit_schema_cache_requests_total",
        "counter",
        "",
        ("dataset", "result"),
        "Requests for the schema: hit in the cache, miss and computed, observed in the running"
        " epoch, or rejected because the dataset was being executed.",
        "coordinator",
        "Schema cache",
        _keyed(lambda snapshot: snapshot.state.schema_requests),
    ),
    Metric(
        "asyncsplit_guard_rejections_total",
        "counter",
        "",
        ("dataset", "operation"),
        "Operations rejected because they would have started a second executor.",
        "coordinator",
        "Guard",
        _keyed(lambda snapshot: snapshot.state.guard_rejections),
    ),
    Metric(
        "asyncsplit_guard_locks_total",
        "counter",
        "",
        _DATASET,
        "How often the lock was held that executor starts and schema requests share.",
        "coordinator",
        "Guard",
        _whole(lambda state: state.guard_locks),
    ),
    Metric(
        "asyncsplit_guard_lock_seconds_total",
        "counter",
        "seconds",
        _DATASET,
        "Seconds under that lock.",
        "coordinator",
        "Guard",
        _whole(lambda state: state.guard_lock_s),
    ),
)


def markdown() -> str:
    """Return the reference of all metrics, as kept in docs/metrics.md."""
    rows = (
        f"| `{metric.name}` | {metric.kind} | {metric.unit}"
        f" | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help}"
        f" | {metric.board.capitalize()}: {metric.panel} |"
        for metric in CATALOG
    )
    bounds = (
        f"| `{metric.name}` | {', '.join(f'{bound:g}' for bound in metric.bounds)} |"
        for metric in CATALOG
        if metric.bounds
    )
    return f"""\
# Metrics

<!-- Generated by `python -m asyncsplit.telemetry.catalog > docs/metrics.md`. -->

Each coordinator serves its metrics in the text formats of Prometheus and OpenMetrics.
`await it.metrics_url()` says where; `SplitOptions(telemetry=TelemetryConfig(...))` sets the address
or turns the endpoint off. Counters begin at 0 with the coordinator; every series is there from then
on. Ages are computed when they are asked for, so they grow while nothing happens.

`dataset` is the name given with `Dataset.set_name`, or `dataset`. `split` is the index of a split.
With more than {MAX_SPLIT_LABELS} splits, `split` is empty in counters, and one series counts for
all of them; gauges have a series for each of the {WORST} worst splits only. So `sum` of a counter
and `max` of a gauge are right with any number of splits, and of `asyncsplit_split_ready_batches`
the `min`.

A consumer is heard of when its loop asks for a batch, once a second at most while batches are
ready. One that trains on a batch for long cannot be told from one that is stuck.

## Ways out

- **Prometheus.** Each coordinator writes a file to `asyncsplit-<user id>` in the temporary
  directory of its node, or to `TelemetryConfig(discovery_dir=...)`, and the file goes when the
  coordinator ends, however that happens. Prometheus reads such files with

  ```yaml
  scrape_configs:
    - job_name: asyncsplit
      file_sd_configs:
        - files: ["/tmp/asyncsplit-1000/*.json"]
  ```

  The labels `__meta_asyncsplit_dataset`, `__meta_asyncsplit_splits` and `__meta_asyncsplit_pid` are
  there for relabelling.
- **OpenTelemetry.** `TelemetryConfig(meter_provider=...)` takes a function that returns the
  `MeterProvider` to use in the coordinator's process. Names are those below, without `_total`. A
  histogram is a counter of its buckets, `_bucket` with the attribute `le`, and counters `_count`
  and `_sum`. `TelemetryConfig(otlp_endpoint=...)` pushes OTLP over HTTP every `push_interval_s`,
  with histograms as such; that needs `asyncsplit[otel]`.
- **Ray's own metrics.** `TelemetryConfig(ray_metrics=True)` adds them there every
  `push_interval_s`, with `ray_` before the name and without the label `split`: sums of counters,
  and the worst split's gauge. Of a histogram there are counters, `_sum_total` and `_count_total`.
  A counter is there once it has counted something, since Ray takes no zero. That needs
  `ray[default]` on all nodes, and is what each node's agent serves at its `MetricsExportPort`, also
  with `ray.init(include_dashboard=False)`.

## Reference

| Metric | Type | Unit | Labels | Meaning | Shown in |
|---|---|---|---|---|---|
{chr(10).join(rows)}

The upper bounds of the histograms' buckets, in seconds:

| Metric | Bounds |
|---|---|
{chr(10).join(bounds)}

{spans.markdown()}"""


if __name__ == "__main__":
    print(markdown(), end="")
