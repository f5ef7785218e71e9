"""What a real Prometheus makes of the endpoint."""

import contextlib
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry.catalog import CATALOG, MAX_SPLIT_LABELS, WAIT_BOUNDS
from asyncsplit.telemetry.counters import ConsumerCounters
from asyncsplit.telemetry.endpoint import Endpoint
from asyncsplit.telemetry.state import CoordinatorState
from tests.telemetry.server import Api, get, scraping, tool


class Prometheus(Api):
    """A running server that scrapes what it finds in a directory."""

    def __init__(
        self,
        url: str,
        directory: str,
        few: CoordinatorState,
        many: CoordinatorState,
        brief: Endpoint,
    ) -> None:
        super().__init__(url)
        self.directory = directory
        self.few = few
        self.many = many
        self.brief = brief

    def query(self, promql: str) -> dict[str, float]:
        """Return values by the ``split`` label; a series without it has the key ``""``."""
        result = self.call("query", query=promql)["result"]
        return {one["metric"].get("split", ""): float(one["value"][1]) for one in result}

    def wait_for(self, promql: str, holds: Callable[[dict[str, float]], bool]) -> None:
        """Ask until it holds; the test's timeout is the bound."""
        while not holds(answer := self.query(promql)):
            print(f"{promql}: {answer}, waiting")
            time.sleep(0.1)


def serve(state: CoordinatorState, directory: str) -> Endpoint:
    endpoint = Endpoint.serve(state, TelemetryConfig(discovery_dir=directory))
    assert endpoint is not None
    return endpoint


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("prometheus")
    found = str(directory / "found")
    few = CoordinatorState.of("id", 2, "few")
    many = CoordinatorState.of("id", MAX_SPLIT_LABELS + 1, "many")
    with contextlib.ExitStack() as stack:
        for state in (few, many):
            stack.enter_context(contextlib.closing(serve(state, found)))
        brief = serve(CoordinatorState.of("id", 3, "brief"), found)
        stack.callback(brief.close)
        api = stack.enter_context(scraping(directory / "found", directory))
        server_api = Prometheus(api.url, found, few, many, brief)
        server_api.wait_for("sum(up)", lambda up: up == {"": 3})
        yield server_api


def test_every_metric_arrives_with_its_type_unit_and_help(prometheus: Prometheus) -> None:
    names = set(prometheus.call("label/__name__/values"))
    parts = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    assert {name for name in names if name.startswith("asyncsplit")} == {
        f"{metric.name}{part}" for metric in CATALOG for part in parts[metric.kind]
    }
    assert prometheus.call("metadata") == {
        metric.name.removesuffix("_total"): [
            {"type": metric.kind, "unit": metric.unit, "help": metric.help}
        ]
        for metric in CATALOG
    }


def test_counters_go_on_when_a_consumer_is_replaced(prometheus: Prometheus) -> None:
    state = prometheus.few
    rows = 'asyncsplit_rows_total{dataset="few"}'
    assert prometheus.query(rows) == {"0": 0, "1": 0}
    state.meet(1, "a", 700)
    state.update(1, "a", ConsumerCounters(rows=7))
    prometheus.wait_for(rows, lambda value: value == {"0": 0, "1": 7})
    state.meet(1, "b", 700)
    state.update(1, "b", ConsumerCounters(rows=5))
    prometheus.wait_for(rows, lambda value: value == {"0": 0, "1": 12})
    assert prometheus.query(f"resets({rows}[1h])") == {"0": 0, "1": 0}


def test_the_first_event_of_a_kind_is_an_increase(prometheus: Prometheus) -> None:
    prometheus.few.conflicts += 1
    prometheus.wait_for(
        'increase(asyncsplit_consumer_conflicts_total{dataset="few"}[1h]) > 0',
        lambda increased: bool(increased),
    )


def test_sums_are_right_with_more_splits_than_labels(prometheus: Prometheus) -> None:
    n = len(prometheus.many.splits)
    for split in range(n):
        prometheus.many.meet(split, "a", 700)
        prometheus.many.update(split, "a", ConsumerCounters(rows=2))
    rows = 'asyncsplit_rows_total{dataset="many"}'
    prometheus.wait_for(f"sum by (dataset) ({rows})", lambda total: total == {"": 2 * n})
    assert prometheus.query(f"count({rows})") == {"": 1}


def test_a_quantile_of_waits_is_in_the_bucket_of_the_waits(prometheus: Prometheus) -> None:
    state = prometheus.few
    waited = [0] * (len(WAIT_BOUNDS) + 1)
    waited[WAIT_BOUNDS.index(5.0)] = 10
    state.meet(0, "a", 700)
    state.update(0, "a", ConsumerCounters(batches=10, waits=10, wait_s=30.0, waited=tuple(waited)))
    buckets = 'increase(asyncsplit_batch_wait_seconds_bucket{dataset="few"}[1h])'
    prometheus.wait_for(
        f"histogram_quantile(0.5, {buckets})", lambda median: 1.0 < median.get("", 0) <= 5.0
    )


def test_a_coordinator_is_scraped_from_its_beginning_to_its_end(prometheus: Prometheus) -> None:
    def up(endpoint: Endpoint) -> str:
        return f'up{{instance="{urllib.parse.urlsplit(endpoint.url).netloc}"}}'

    prometheus.wait_for(up(prometheus.brief), lambda value: value == {"": 1})
    # Prometheus looks at what it has discovered every five seconds: one coordinator begins as the
    # other ends.
    prometheus.brief.close()
    later = serve(CoordinatorState.of("id", 3, "later"), prometheus.directory)
    with contextlib.closing(later):
        prometheus.wait_for(up(later), lambda value: value == {"": 1})
        prometheus.wait_for('asyncsplit_splits{dataset="later"}', lambda n: n == {"": 3})
        # Not down: gone.
        prometheus.wait_for(up(prometheus.brief), lambda value: value == {})


def test_promtool_finds_nothing_to_complain_about() -> None:
    promtool = tool("promtool")
    config = TelemetryConfig(discovery_dir=False)
    endpoint = Endpoint.serve(CoordinatorState.of("id", 2), config)
    assert endpoint is not None
    with contextlib.closing(endpoint):
        text = get(endpoint.url)
    check = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
