"""What the state makes of messages and of time; ages are moved back instead of waited for."""

import itertools
import math
import time
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from asyncsplit.core.epochs import Epochs, Stream
from asyncsplit.core.ledger import Ledger
from asyncsplit.core.liveness import Liveness
from asyncsplit.core.routing import Equal, Part, make_router
from asyncsplit.distribution import Distribution
from asyncsplit.telemetry.catalog import (
    CATALOG,
    MAX_SPLIT_LABELS,
    WAIT_BOUNDS,
    WORST,
    Observed,
    Snapshot,
)
from asyncsplit.telemetry.collector import StateCollector
from asyncsplit.telemetry.counters import ConsumerCounters, StreamTimes
from asyncsplit.telemetry.ray_metrics import without_splits
from asyncsplit.telemetry.state import CoordinatorState, PumpClock, SplitState
from asyncsplit.wire import Delivery, Slice
from tests.profiles import FEWER

LONG = 1000.0
"""Seconds that no test takes."""


class Job:
    """The decisions of a coordinator without Ray, and the state that tells of them."""

    def __init__(self, n: int, *, equal: Equal = False) -> None:
        ledger = Ledger(n, make_router(n, equal=equal, routing="rows"), 1000)
        self.ledger = ledger
        self.distribution = Distribution(ledger, cast("Any", None), lambda _: None)
        self.state = CoordinatorState.of("id", n, "job", lambda: self.distribution)
        self.epochs = Epochs(n)
        self.liveness = Liveness(None, None)
        self.arrived_at: dict[int, float] = {}
        self.state.watch(self.epochs, self.liveness, self.arrived_at)

    def arrive(self, *splits: int, ago: float = 0.0) -> None:
        for split in splits:
            self.epochs.arrive(split, Stream(str(split), 1))
            self.state.meet(split, str(split), 700)
            self.arrived_at[split] = time.monotonic() - ago

    def run(self) -> None:
        self.epochs.open()
        self.state.epoch_opened()
        self.epochs.started()
        self.state.epoch_started()

    def value(self, name: str, **labels: str) -> float:
        registry = CollectorRegistry()
        registry.register(StateCollector(self.state))
        found = registry.get_sample_value(name, {"dataset": "job", **labels})
        assert found is not None, (name, labels)
        return found

    def by_split(self, name: str) -> list[float]:
        n = len(self.state.splits)
        return [self.value(f"asyncsplit_{name}", split=str(split)) for split in range(n)]


def test_who_is_missing_at_the_barrier_is_named_and_the_wait_ages() -> None:
    job = Job(3)
    assert job.by_split("split_missing") == [0, 0, 0], "nobody waits"
    job.arrive(0, ago=LONG)
    job.arrive(2)
    assert job.by_split("split_missing") == [0, 1, 0]
    assert job.value("asyncsplit_barrier_missing_splits") == 1
    assert job.value("asyncsplit_wait_age_seconds", wait="barrier") >= LONG
    assert job.by_split("split_wait_age_seconds")[0] >= LONG
    silences = job.by_split("split_silence_seconds")
    assert silences[1] >= LONG, "never heard of: as long as the first has waited"
    assert silences[0] == silences[2] == 0, "it is not their turn"
    job.arrive(1)
    job.run()
    assert job.by_split("split_missing") == [0, 0, 0]
    assert job.value("asyncsplit_wait_age_seconds", wait="barrier") == 0
    assert job.value("asyncsplit_barrier_wait_seconds_sum") >= LONG


def test_who_has_arrived_early_neither_waits_nor_is_silent() -> None:
    job = Job(2)
    ages = [f"split_{age}_seconds" for age in ("wait_age", "silence", "batch_age")]
    ages.append("split_missing")
    for number in (0, 1):
        assert all(job.by_split(name) == [0, 0] for name in ages)
        job.epochs.arrive(number, Stream(str(number), 1), early=True)
    job.run()
    for split in job.state.splits:
        split.heard_at = split.batch_at = time.monotonic() - LONG
    assert all(job.by_split(name) == [0, 0] for name in ages)
    assert job.value("asyncsplit_wait_age_seconds", wait="barrier") == 0
    job.epochs.check(1, 0, Stream("1", 1))
    assert job.by_split("split_silence_seconds")[1] >= LONG, "its loop has begun"


def test_a_stuck_consumer_is_silent_and_one_that_waits_is_not() -> None:
    job = Job(2)
    job.arrive(0, 1)
    job.run()
    for split in job.state.splits:
        split.heard_at = split.batch_at = time.monotonic() - LONG
    job.distribution.waiting_since[1] = time.monotonic() - LONG / 2
    assert all(age >= LONG for age in job.by_split("split_batch_age_seconds"))
    silences = job.by_split("split_silence_seconds")
    assert silences[0] >= LONG
    assert silences[1] == 0
    assert job.by_split("split_wait_age_seconds")[0] == 0
    assert LONG / 2 <= job.value("asyncsplit_wait_age_seconds", wait="pull") < LONG
    job.state.update(0, "0", ConsumerCounters(rows=5, batches=1))
    assert job.by_split("split_batch_age_seconds")[0] < LONG
    assert job.by_split("split_silence_seconds")[0] < LONG


def test_a_message_without_a_batch_ends_the_silence_only() -> None:
    job = Job(1)
    job.arrive(0)
    job.run()
    job.state.splits[0].heard_at = job.state.splits[0].batch_at = time.monotonic() - LONG
    job.state.update(0, "0", ConsumerCounters(stream_s=1.0))
    assert job.by_split("split_silence_seconds")[0] < LONG
    assert job.by_split("split_batch_age_seconds")[0] >= LONG


def test_a_dead_consumer_is_silent_whatever_it_had_asked_for() -> None:
    job = Job(2)
    job.arrive(0, 1)
    job.run()
    job.distribution.waiting_since[1] = time.monotonic()
    job.state.splits[1].heard_at = time.monotonic() - LONG
    job.liveness.mourn(1, time.monotonic())
    assert job.by_split("split_dead") == [0, 1]
    assert job.by_split("split_silence_seconds")[1] >= LONG


def test_nobody_has_an_age_between_epochs() -> None:
    job = Job(2)
    job.arrive(0, 1)
    job.run()
    for split in job.state.splits:
        split.heard_at = split.batch_at = time.monotonic() - LONG
    job.epochs.over()
    job.state.epoch_ended("failed")
    assert job.by_split("split_batch_age_seconds") == [0, 0]
    assert job.by_split("split_silence_seconds") == [0, 0]
    assert job.value("asyncsplit_epoch_age_seconds") == 0
    assert job.value("asyncsplit_epoch_duration_seconds_count") == 1


def test_ages_that_no_message_ends_are_computed_when_asked_for() -> None:
    job = Job(1)
    job.state.guard_locked_at = job.state.tick_due = time.monotonic() - LONG
    job.state.pump.value = job.state.pump.value._replace(
        blocked_on="dataset", since=time.monotonic() - LONG
    )
    for wait in ("lock", "loop", "dataset"):
        assert job.value("asyncsplit_wait_age_seconds", wait=wait) >= LONG
    assert job.value("asyncsplit_wait_age_seconds", wait="consumers") == 0
    assert job.value("asyncsplit_pump_blocked_seconds_total", blocked_on="dataset") >= LONG


def part(rows: int) -> Part:
    return Part(object(), 0, rows, 10 * rows, None)


def test_bytes_held_are_those_of_the_epoch_started_ahead_too() -> None:
    job, ahead = Job(1), Job(1)
    job.state.watch(job.epochs, job.liveness, job.arrived_at, lambda: ahead.distribution)
    for each in (job, ahead):
        each.ledger.produce([part(100), part(1)])
        each.ledger.route()
    assert ahead.ledger.leased_bytes + ahead.ledger.router.unassigned_bytes == 1010
    assert job.value("asyncsplit_leased_bytes") == 2 * ahead.ledger.leased_bytes
    unassigned = ahead.ledger.router.unassigned_bytes
    assert job.value("asyncsplit_unassigned_bytes") == 2 * unassigned
    assert job.by_split("split_waiting_bytes") == [ahead.ledger.leased_bytes], "of the one read"


def test_rows_bytes_and_skew_are_those_of_the_ledger() -> None:
    job = Job(2)
    job.arrive(0, 1)
    job.run()
    job.ledger.produce([part(10), part(10)])
    job.ledger.route()
    job.ledger.acknowledge(0, 10, fed=1)
    assert job.by_split("split_waiting_bytes") == [0, 100]
    assert job.by_split("split_behind_rows") == [0, 10]
    assert job.value("asyncsplit_skew_ratio") == 1
    assert job.value("asyncsplit_leased_bytes") == 100
    assert job.value("asyncsplit_prefetch_budget_bytes") == 1000
    job.ledger.acknowledge(1, 5, fed=1)
    assert job.value("asyncsplit_skew_ratio") == 0.5
    rows = {"unassigned": 0, "leased": 5, "committed": 15, "truncated": 0}
    for state, expected in rows.items():
        assert job.value("asyncsplit_epoch_rows", state=state) == expected
    job.ledger.leave(1)
    assert job.by_split("split_behind_rows") == [0, 0], "who has left is not behind"


@pytest.mark.parametrize("equal", [True, False])
def test_truncated_rows_have_their_reason(equal: bool) -> None:
    job = Job(2, equal=equal)
    job.arrive(0, 1)
    job.run()
    job.ledger.produce([part(5)])
    job.ledger.finish()
    job.ledger.route()
    job.ledger.acknowledge(0, 1, fed=1)
    left = job.ledger.logs[0].leased_rows
    job.ledger.leave(0)
    job.state.epoch_ended("stopped")
    assert job.state.truncated_rows == {"equal": int(equal), "left_early": left}
    assert left > 0


def test_padded_rows_are_counted_when_their_epoch_ends() -> None:
    job = Job(3, equal="pad")
    job.arrive(0, 1, 2)
    job.run()
    job.ledger.produce([part(4)])
    job.ledger.finish()
    job.ledger.route()
    job.state.epoch_ended("completed")
    assert job.value("asyncsplit_padded_rows_total") == 2
    assert job.state.truncated_rows == {"equal": 0, "left_early": 0}


def delivery(cursor: int, *rows: int, skip: int = 0) -> Delivery:
    slices = tuple(Slice(cast("Any", None), 0, n, n) for n in rows)
    return Delivery(cursor, slices, end=False, skip_rows=skip)


def test_rows_are_redelivered_that_were_sent_before_and_not_committed() -> None:
    job = Job(1)
    job.state.send(0, delivery(0, 10, 20))
    job.state.send(0, delivery(2, 30))
    assert job.state.redelivered_rows == 0
    job.state.send(0, delivery(1, 20, 30, 40, skip=5))
    assert job.state.redelivered_rows == 45
    job.arrive(0)
    job.run()
    job.state.send(0, delivery(0, 10))
    assert job.state.redelivered_rows == 45, "another epoch counts anew"


def test_first_batches_are_counted_from_the_opening_of_the_barrier() -> None:
    job = Job(1)
    job.arrive(0)
    job.run()
    job.state.splits[0].start_s = 3.0
    job.state.update(0, "0", ConsumerCounters(batches=1, firsts=1, first_s=2.0))
    job.state.update(0, "0", ConsumerCounters(batches=2, firsts=1, first_s=2.0))
    assert job.value("asyncsplit_first_batch_seconds_count") == 1
    assert job.value("asyncsplit_first_batch_seconds_sum") == 5
    assert job.value("asyncsplit_first_batch_seconds_bucket", le="5.0") == 1
    assert job.value("asyncsplit_first_batch_seconds_bucket", le="2.5") == 0


def test_ready_batches_are_counted_since_the_last_wait() -> None:
    split = SplitState()
    split.add(ConsumerCounters(batches=4, waits=1))
    assert split.ready_batches == 0
    split.add(ConsumerCounters(batches=9, waits=1))
    assert split.ready_batches == 5
    split.add(ConsumerCounters(batches=10, waits=2))
    assert split.ready_batches == 0


def test_the_stall_ratio_is_of_the_latest_ten_seconds() -> None:
    split = SplitState()
    split.add(ConsumerCounters(wait_s=9, stream_s=9))
    assert split.stall_ratio == 0, "too little to tell"
    split.add(ConsumerCounters(wait_s=9, stream_s=12))
    assert split.stall_ratio == 0.75
    split.add(ConsumerCounters(wait_s=10, stream_s=32))
    assert split.stall_ratio == 0.05


def test_a_late_timer_is_a_lag() -> None:
    state = CoordinatorState.of("id", 1)
    state.ticked()
    assert sum(state.loop_lag.counts) == 0, "none was set"
    state.tick_in(-LONG)
    state.ticked()
    assert state.loop_lag.counts[-1] == 1
    assert state.loop_lag.total >= LONG
    assert state.tick_due is None


@FEWER
@given(st.lists(st.sampled_from(["dataset", "consumers", None]), max_size=20))
def test_the_pumps_time_only_grows_and_none_is_counted_twice(steps: list[Any]) -> None:
    clock = PumpClock()
    began = time.monotonic()
    before = (0.0, 0.0)
    for step in steps:
        clock.blocked_on(step)
        now = clock.value.at(time.monotonic())[:2]
        assert now[0] >= before[0]
        assert now[1] >= before[1]
        assert sum(now) <= time.monotonic() - began
        before = now


class Turn(NamedTuple):
    """One batch: what the loop waits for it, by cause, and how long it trains."""

    causes: list[tuple[Any, float]]
    conversion_s: float
    batch: bool
    training_s: float


SECONDS = st.floats(0, 100)
TURNS = st.builds(
    Turn,
    st.lists(st.tuples(st.sampled_from(["barrier", "data", "transfer"]), SECONDS), max_size=3),
    SECONDS,
    st.booleans(),
    SECONDS,
)


@FEWER
@given(st.lists(TURNS, max_size=10))
def test_a_streams_time_is_told_apart_and_none_of_it_falls(turns: list[Turn]) -> None:
    times, now = StreamTimes(0.0), 0.0
    split = SplitState()
    seen = [(0.0, 0.0, 0.0)]

    def report() -> ConsumerCounters:
        counters = times.totals(now, rows=0, batches=0, blocks=0, size_bytes=0, backlog_bytes=0)
        split.add(counters)
        seen.append((split.total.wait_s, split.training_s, split.conversion_s))
        return counters

    for turn in turns:
        times.wait(now)
        report()
        for cause, seconds in turn.causes:
            now += seconds
            times.waited_for(cause, seconds)
            report()
        now += turn.conversion_s
        report()
        times.got(now, batch=turn.batch)
        times.go_on(now)
        report()
        now += turn.training_s
        report()
    last = report()
    for before, after in itertools.pairwise(seen):
        assert all(a >= b for a, b in zip(after, before, strict=True))
    assert sum(last.waited) == len(turns)
    assert last.waits == sum(turn.batch for turn in turns)
    assert last.firsts == any(turn.batch for turn in turns)
    expected = {
        cause: math.fsum(s for turn in turns for c, s in turn.causes if c == cause)
        for cause in ("barrier", "data", "transfer")
    }
    assert last.barrier_s == pytest.approx(expected["barrier"])
    assert last.data_s == pytest.approx(expected["data"])
    assert last.transfer_s == pytest.approx(expected["transfer"])
    conversion_s = math.fsum(turn.conversion_s for turn in turns)
    training_s = math.fsum(turn.training_s for turn in turns)
    assert split.conversion_s == pytest.approx(conversion_s, abs=1e-6)
    assert split.training_s == pytest.approx(training_s, abs=1e-6)
    assert last.wait_s + split.training_s == pytest.approx(last.stream_s, abs=1e-6)


@pytest.mark.parametrize("waited_s", [0.0, *WAIT_BOUNDS, 1e6])
def test_a_wait_falls_into_the_bucket_that_bounds_it(waited_s: float) -> None:
    times = StreamTimes(0.0)
    times.wait(0.0)
    times.got(waited_s, batch=True)
    (bucket,) = (bucket for bucket, count in enumerate(times.waited) if count)
    bounds = (0.0, *WAIT_BOUNDS, math.inf)
    assert waited_s <= bounds[bucket + 1]
    assert bucket == 0 or waited_s > bounds[bucket]


def test_the_longest_lag_is_told_once() -> None:
    times = StreamTimes(0.0)
    times.lag_s = 0.5
    nothing = {"rows": 0, "batches": 0, "blocks": 0, "size_bytes": 0, "backlog_bytes": 0}
    assert times.totals(1.0, **nothing).lag_s == 0.5
    assert times.totals(2.0, **nothing).lag_s == 0


@pytest.mark.parametrize("n", [3, MAX_SPLIT_LABELS + 100])
def test_the_worst_splits_are_shown_however_many_there_are(n: int) -> None:
    state = CoordinatorState.of("id", n)
    for number, split in enumerate(state.splits):
        split.stall_ratio = number / n
        split.latest = ConsumerCounters(batches=100 + number)
    snapshot = Snapshot.of(state)
    metrics = {metric.name: metric for metric in CATALOG}
    shown = dict(metrics["asyncsplit_split_stall_ratio"].read(snapshot))
    assert max(cast("list[float]", list(shown.values()))) == (n - 1) / n
    assert shown["dataset", str(n - 1)] == (n - 1) / n
    fewest = dict(metrics["asyncsplit_split_ready_batches"].read(snapshot))
    assert min(cast("list[float]", list(fewest.values()))) == 100
    assert len(shown) == len(fewest) == min(n, WORST if n > MAX_SPLIT_LABELS else n)


def test_splits_are_put_together_as_each_metric_says() -> None:
    state = CoordinatorState.of("id", 3)
    for number, split in enumerate(state.splits):
        state.meet(number, "a", 0)
        state.update(number, "a", ConsumerCounters(rows=10 + number, batches=5 + number))
        split.stall_ratio = number / 4
    snapshot = Snapshot.of(state)
    metrics = {metric.name: metric for metric in CATALOG}
    for name, expected in (
        ("asyncsplit_rows_total", 33),
        ("asyncsplit_split_stall_ratio", 0.5),
        ("asyncsplit_split_ready_batches", 5),
    ):
        assert without_splits(metrics[name], snapshot) == {("dataset",): expected}
    for metric in CATALOG:
        together = without_splits(metric, snapshot)
        assert len(together) <= 7, "few enough for Ray's pipeline"
        kinds = {isinstance(value, Observed) for value in together.values()}
        assert kinds == {metric.kind == "histogram"}
