import asyncio
import contextlib
import http.client
import itertools
import logging
import math
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry.catalog import CATALOG, MAX_SPLIT_LABELS, WORST, Metric, markdown
from asyncsplit.telemetry.collector import StateCollector
from asyncsplit.telemetry.counters import ConsumerCounters
from asyncsplit.telemetry.endpoint import Endpoint
from asyncsplit.telemetry.state import CoordinatorState, SplitState
from asyncsplit.telemetry.summary import summary
from tests.profiles import FEWER

TraceFunction = Callable[[FrameType, str, Any], Any]
Series = tuple[str, frozenset[tuple[str, str]]]

LABELS = {
    *("blocked_on", "cause", "dataset", "location", "operation", "outcome", "phase", "ray_version"),
    *("reason", "result", "split", "state", "version", "wait"),
}


@pytest.fixture(autouse=True)
def _own_discovery_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def registry_of(state: CoordinatorState) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(StateCollector(state))
    return registry


def exposed(state: CoordinatorState) -> dict[Series, float]:
    text = generate_latest(registry_of(state)).decode()
    samples = [sample for family in parse_text(text) for sample in family.samples]
    series = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(series) == len(samples), "a series appears twice"
    return series


def get(url: str) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=10) as response:
        return str(response.read().decode())


@contextlib.contextmanager
def serving(state: CoordinatorState, config: TelemetryConfig) -> Iterator[Endpoint]:
    endpoint = Endpoint.serve(state, config)
    assert endpoint is not None
    with contextlib.closing(endpoint):
        yield endpoint


@pytest.mark.parametrize("metric", CATALOG, ids=lambda metric: metric.name)
def test_names_follow_the_rules_of_prometheus(metric: Metric) -> None:
    assert re.fullmatch("asyncsplit(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    base = metric.name.removesuffix("_total")
    assert {unit for unit in ("bytes", "seconds", "ratio") if base.endswith(f"_{unit}")} == (
        {metric.unit} - {""}
    )
    assert set(metric.labels) <= LABELS, "labels need a bounded set of values"
    assert metric.help.endswith(".")
    assert bool(metric.bounds) == (metric.kind == "histogram")
    assert list(metric.bounds) == sorted(set(metric.bounds))
    assert metric.panel


def test_names_differ_by_more_than_the_total_suffix() -> None:
    families = [metric.name.removesuffix("_total") for metric in CATALOG]
    assert len(set(families)) == len(families), "OpenMetrics has one family per name, less _total"


def test_the_endpoint_serves_what_the_catalog_lists() -> None:
    state = CoordinatorState.of("id", 2)
    text = generate_latest(registry_of(state)).decode()
    families = {family.name: family for family in parse_text(text)}
    assert families.keys() == {metric.name.removesuffix("_total") for metric in CATALOG}
    for metric in CATALOG:
        family = families[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert {frozenset(sample.labels) - {"le"} for sample in family.samples} == {
            frozenset(metric.labels)
        }
        bounds = {sample.labels["le"] for sample in family.samples if "le" in sample.labels}
        assert {*map(float, bounds)} == ({*metric.bounds, math.inf} if metric.bounds else set())


def test_the_reference_lists_what_the_catalog_lists() -> None:
    reference = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert reference.read_text() == markdown(), (
        "run: python -m asyncsplit.telemetry.catalog > docs/metrics.md"
    )


def test_all_series_are_there_from_the_start_and_zero() -> None:
    state = CoordinatorState.of("id", 2, "flights")
    before = exposed(state)
    assert {name for (name, _), value in before.items() if value != 0} == {
        *("asyncsplit_build_info", "asyncsplit_epoch", "asyncsplit_epoch_phase"),
        *("asyncsplit_executor_state", "asyncsplit_splits", "asyncsplit_start_time_seconds"),
    }
    state.meet(0, "a", 700)
    state.update(0, "a", ConsumerCounters(1, 1, 1, 1, 1, 1.0, 1.0))
    for counts in (
        *(state.schema_requests, state.guard_rejections, state.epochs),
        *(state.truncated_rows, state.rejoins),
    ):
        for key in counts:
            counts[key] += 1
    assert exposed(state).keys() == before.keys()


def test_counts_arrive_under_their_names() -> None:
    state = CoordinatorState.of("id", 2, "flights")
    state.meet(1, "a", 700)
    state.update(1, "a", ConsumerCounters(10, 3, 2, 4096, 1, 0.5, 2.0, remote_blocks=2))
    state.epochs["completed"] = 4
    state.schema_requests["hit"] = 5
    state.guard_rejections["schema"] = 6
    state.guard_lock_s = 0.25
    state.truncated_rows["equal"] = 7
    state.padded_rows = 9
    state.conflicts = 8
    values = {
        (name, *(value for label, value in sorted(labels) if label != "dataset")): value
        for (name, labels), value in exposed(state).items()
        if ("dataset", "flights") in labels and value and "le" not in dict(labels)
    }
    values.pop(("asyncsplit_start_time_seconds",))
    assert values == {
        ("asyncsplit_splits",): 2,
        ("asyncsplit_epoch",): -1,
        ("asyncsplit_epoch_phase", "waiting"): 1,
        ("asyncsplit_executor_state", "idle"): 1,
        ("asyncsplit_training_seconds_total", "1"): 1.5,
        ("asyncsplit_stall_seconds_total", "conversion"): 0.5,
        ("asyncsplit_batch_wait_seconds_count",): 2,
        ("asyncsplit_batch_wait_seconds_sum",): 0.5,
        ("asyncsplit_rows_total", "1"): 10,
        ("asyncsplit_batches_total", "1"): 3,
        ("asyncsplit_blocks_total", "1"): 2,
        ("asyncsplit_located_blocks_total", "remote"): 2,
        ("asyncsplit_bytes_total", "1"): 4096,
        ("asyncsplit_waited_batches_total", "1"): 1,
        ("asyncsplit_wait_seconds_total", "1"): 0.5,
        ("asyncsplit_stream_seconds_total", "1"): 2,
        ("asyncsplit_epochs_total", "completed"): 4,
        ("asyncsplit_schema_cache_requests_total", "hit"): 5,
        ("asyncsplit_guard_rejections_total", "schema"): 6,
        ("asyncsplit_guard_lock_seconds_total",): 0.25,
        ("asyncsplit_truncated_rows_total", "equal"): 7,
        ("asyncsplit_padded_rows_total",): 9,
        ("asyncsplit_consumer_conflicts_total",): 8,
        ("asyncsplit_iterator_size_bytes",): 700,
        ("asyncsplit_iterator_serialized_bytes_total",): 700,
        ("asyncsplit_iterator_serializations_total",): 1,
    }


@pytest.mark.parametrize("n", [1, MAX_SPLIT_LABELS, MAX_SPLIT_LABELS + 1, 1_024, 5_000])
def test_the_number_of_series_is_bounded(n: int) -> None:
    state = CoordinatorState.of("id", n)
    for split in range(n):
        state.meet(split, "a", 0)
        state.update(split, "a", ConsumerCounters(rows=split))
    series = exposed(state)
    rows = {
        dict(labels)["split"]: value
        for (name, labels), value in series.items()
        if name == "asyncsplit_rows_total"
    }
    alone = n <= MAX_SPLIT_LABELS
    assert rows.keys() == ({str(split) for split in range(n)} if alone else {""})
    assert sum(rows.values()) == sum(range(n))
    assert len(series) < (1_500 if alone else 500)
    by_split = Counter(name for name, labels in series if dict(labels).get("split"))
    assert set(by_split.values()) == {n if alone else WORST}


class Slow(CoordinatorState):
    """Takes its time to be read."""

    began = threading.Event()
    may_go_on = threading.Event()
    read_by: ClassVar[set[int]] = set()

    @property
    def ledger(self) -> None:
        self.read_by.add(threading.get_ident())
        self.began.set()
        self.may_go_on.wait()


@pytest.mark.asyncio
async def test_the_event_loop_goes_on_while_a_scrape_takes_its_time() -> None:
    state = Slow("id", [SplitState() for _ in range(1_024)])
    endpoint = await asyncio.to_thread(Endpoint.serve, state, TelemetryConfig())
    assert endpoint is not None
    try:
        scrapes = [asyncio.create_task(asyncio.to_thread(get, endpoint.url)) for _ in range(2)]
        await asyncio.to_thread(state.began.wait)
        state.meet(1_023, "a", 700)
        for rows in range(1_000):
            state.update(1_023, "a", ConsumerCounters(rows=rows))
            await asyncio.sleep(0)
        assert not any(scrape.done() for scrape in scrapes)
        state.may_go_on.set()
        assert all("asyncsplit_epoch_rows" in text for text in await asyncio.gather(*scrapes))
        assert state.read_by
        assert threading.get_ident() not in state.read_by
        text = await asyncio.to_thread(get, endpoint.url)
        assert 'asyncsplit_rows_total{dataset="dataset",split=""} 999.0' in text
    finally:
        state.may_go_on.set()
        await asyncio.to_thread(endpoint.close)


class Given(Collector):
    """Some of the families: rendering all for each of many names takes its time."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


@FEWER
@given(name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_dataset_name_survives_both_text_formats(name: str) -> None:
    state = CoordinatorState.of("id", 1, name)
    families = [
        family
        for family in StateCollector(state).collect()
        if family.name in ("asyncsplit_rows", "asyncsplit_splits", "asyncsplit_loop_lag_seconds")
    ]
    assert {family.type for family in families} == {"counter", "gauge", "histogram"}
    registry = CollectorRegistry()
    registry.register(Given(families))
    for parsed in (
        parse_text(generate_latest(registry).decode()),
        parse_openmetrics(openmetrics.generate_latest(registry).decode()),  # type: ignore[no-untyped-call]
    ):
        samples = [sample for family in parsed for sample in family.samples]
        assert {sample.labels.get("dataset", name) for sample in samples} == {name}
        assert not [sample for sample in samples if sample.name.endswith("_created")]


def test_one_metric_can_be_asked_for() -> None:
    with serving(CoordinatorState.of("id", 1), TelemetryConfig()) as endpoint:
        text = get(f"{endpoint.url}?name[]=asyncsplit_rows_total")
    assert [family.name for family in parse_text(text)] == ["asyncsplit_rows"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
def test_the_url_leads_to_the_metrics(host: str) -> None:
    if host == "::1":
        try:
            socket.create_server((host, 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
    state = CoordinatorState.of("id", 1)
    with serving(state, TelemetryConfig(host=host)) as endpoint:
        assert re.fullmatch(r"http://\S+:\d+/metrics", endpoint.url)
        assert "//0.0.0.0" not in endpoint.url
        assert get(endpoint.url) == generate_latest(registry_of(state)).decode()


def test_a_silent_client_keeps_nobody_waiting() -> None:
    with serving(CoordinatorState.of("id", 1), TelemetryConfig()) as endpoint:
        address = re.fullmatch(r"http://(.*):(\d+)/metrics", endpoint.url)
        assert address is not None
        with socket.create_connection((address[1], int(address[2]))):
            assert get(endpoint.url)


def test_a_failing_scrape_is_logged_and_the_next_one_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = CoordinatorState.of("id", 1)
    splits = state.splits
    with serving(state, TelemetryConfig()) as endpoint:
        state.splits = None  # type: ignore[assignment]
        with pytest.raises(http.client.RemoteDisconnected):
            get(endpoint.url)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        state.splits = splits
        assert get(endpoint.url)


def test_close_frees_the_port() -> None:
    with serving(CoordinatorState.of("id", 1), TelemetryConfig()) as endpoint:
        port = int(endpoint.url.removesuffix("/metrics").rpartition(":")[2])
        endpoint.close()
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(endpoint.url)
        socket.create_server(("127.0.0.1", port)).close()


def test_switched_off_nothing_listens(caplog: pytest.LogCaptureFixture) -> None:
    threads = threading.active_count()
    config = TelemetryConfig(enabled=False)
    assert Endpoint.serve(CoordinatorState.of("id", 1), config) is None
    assert threading.active_count() == threads
    assert not caplog.records


def test_a_port_in_use_is_one_warning_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert Endpoint.serve(CoordinatorState.of("id", 1), TelemetryConfig(port=port)) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in ("'127.0.0.1'", str(port), "in use", "TelemetryConfig(port=0)"):
        assert part in record.getMessage()


@pytest.mark.parametrize("host", ["203.0.113.1", "a..b"], ids=["not-ours", "not-a-name"])
def test_a_host_that_cannot_be_bound_is_one_warning_and_no_error(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert Endpoint.serve(CoordinatorState.of("id", 1), TelemetryConfig(host=host)) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert repr(host) in record.getMessage()


QUARTERS = st.integers(0, 40).map(lambda quarters: quarters / 4)  # these add up exactly
COUNTS = st.integers(0, 100)
STEPS = st.builds(
    ConsumerCounters,
    *[COUNTS] * 5,
    *[QUARTERS] * 5,
    firsts=COUNTS,
    first_s=QUARTERS,
    local_blocks=COUNTS,
    remote_blocks=COUNTS,
    waited=st.tuples(*[COUNTS] * len(ConsumerCounters().waited)),
    backlog_bytes=COUNTS,
    lag_s=QUARTERS,
)
TOTALS = slice(0, ConsumerCounters._fields.index("backlog_bytes"))
"""The fields that only grow."""


def flattened(counters: ConsumerCounters) -> list[float]:
    values: list[Any] = list(counters)[TOTALS]
    *numbers, waited = values
    return [*numbers, *waited]


class Stint(NamedTuple):
    """The time a consumer has a split: its totals in it, and the messages that arrive in it."""

    consumer: int
    totals: list[ConsumerCounters]
    messages: list[tuple[int, ConsumerCounters]]


@st.composite
def histories(draw: st.DrawFn) -> list[Stint]:
    """Draw consumers that take turns, come back, and whose messages repeat or come late."""
    totals: dict[int, ConsumerCounters] = {}
    sent: list[tuple[int, ConsumerCounters]] = []
    stints = []
    for consumer, _ in itertools.groupby(draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))):
        began = totals.get(consumer, ConsumerCounters())
        steps = draw(st.lists(STEPS, min_size=1, max_size=4))
        own = list(itertools.accumulate(steps, ConsumerCounters.plus, initial=began))
        totals[consumer] = own[-1]
        sent += [(consumer, total) for total in own]
        stints.append(Stint(consumer, own, draw(st.lists(st.sampled_from(sent), max_size=8))))
    return stints


@FEWER
@given(histories())
def test_nothing_is_counted_twice_or_taken_back(history: list[Stint]) -> None:
    state = CoordinatorState.of("id", 1)
    expected = ConsumerCounters()
    for stint in history:
        state.meet(0, str(stint.consumer), 700, stint.totals[0])
        for sender, counters in stint.messages:
            before = state.delivered
            state.update(0, str(sender), counters)
            state.meet(0, str(stint.consumer), 700, stint.totals[0])
            flat = zip(flattened(state.delivered), flattened(before), strict=True)
            assert all(a >= b for a, b in flat)
        arrived = [one for sender, one in stint.messages if sender == stint.consumer]
        last = max((stint.totals[0], *arrived))
        expected = expected.plus(last.minus(stint.totals[0]))
        assert state.delivered[TOTALS] == expected[TOTALS]
    new = [stint for stint in history if stint.totals[0] == ConsumerCounters()]
    assert state.serializations == len(new)
    assert state.serialized_bytes_total == 700 * len(new)


def test_no_counter_falls_between_any_two_steps_of_a_change() -> None:
    state = CoordinatorState.of("id", 1)
    seen: list[int] = []

    def observe(frame: FrameType, _event: str, _argument: object) -> TraceFunction:
        frame.f_trace_opcodes = True
        seen.append(state.splits[0].total.rows)
        return observe

    tracing = sys.gettrace()
    sys.settrace(observe)
    try:
        for consumer in ("a", "b"):
            state.meet(0, consumer, 700)
            state.update(0, consumer, ConsumerCounters(rows=2))
            state.update(0, consumer, ConsumerCounters(rows=5))
    finally:
        sys.settrace(tracing)
    assert seen == sorted(seen)
    assert set(seen) == {0, 2, 5, 7, 10}


def test_the_summary_of_nothing_is_no_error() -> None:
    assert "0 rows" in summary(CoordinatorState.of("id", 1))


def test_the_summary_names_the_eight_splits_that_waited_most_worst_first() -> None:
    state = CoordinatorState.of("id", 10, "flights")
    for split in range(10):
        state.meet(split, "a", 700)
        state.update(
            split, "a", ConsumerCounters(1_000, 10, 2, 2**20, 1, wait_s=split, stream_s=10.0)
        )
    text = summary(state)
    assert "'flights'" in text
    assert "10,000 rows in 100 batches, from 20 blocks of 10.0 MiB" in text
    assert "45.0% of 100.0 s" in text
    assert (
        "9: 90.0%, 8: 80.0%, 7: 70.0%, 6: 60.0%, 5: 50.0%, 4: 40.0%, 3: 30.0%, 2: 20.0%\n" in text
    )
    assert "700 bytes pickled, 10 times" in text
