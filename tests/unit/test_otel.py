"""What arrives at OpenTelemetry's own SDK, and at a receiver of OTLP."""

import contextlib
import logging
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry.catalog import CATALOG, MAX_SPLIT_LABELS, Metric
from asyncsplit.telemetry.complaints import Complaints, overheard
from asyncsplit.telemetry.counters import ConsumerCounters, Exemplar
from asyncsplit.telemetry.outlets import Outlets
from asyncsplit.telemetry.state import CoordinatorState
from tests.unit.receiver import Receiver

UNITS = {"bytes": "By", "seconds": "s", "ratio": "1", "": ""}
PARTS = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


def otel_name(metric: Metric) -> str:
    return metric.name.removesuffix("_total")


def busy() -> CoordinatorState:
    state = CoordinatorState.of("id", 2, "flights")
    state.meet(0, "a", 700)
    waited = (3, 0, 2, *[0] * (len(ConsumerCounters().waited) - 3))
    counters = ConsumerCounters(rows=50, batches=10, waits=5, wait_s=0.5, waited=waited)
    slow = Exemplar(2, "ab" * 16, "cd" * 8, 0.009, 1_700_000_000.0)
    state.update(0, "a", counters._replace(exemplars=(slow,)))
    state.meet(1, "b", 700)
    state.update(1, "b", ConsumerCounters(rows=7))
    state.epoch_duration.observe(2.0)
    return state


@contextlib.contextmanager
def outlets(state: CoordinatorState, **config: Any) -> Iterator[Outlets]:
    with contextlib.closing(Outlets(state, TelemetryConfig(enabled=False, **config))) as opened:
        yield opened


def collected(reader: InMemoryMetricReader) -> dict[str, Any]:
    data = reader.get_metrics_data()
    assert data is not None
    (resource,) = data.resource_metrics
    (scope,) = resource.scope_metrics
    assert scope.scope.name == "asyncsplit"
    return {metric.name: metric for metric in scope.metrics}


def test_a_meter_provider_observes_what_the_catalog_lists() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    with outlets(busy(), meter_provider=lambda: provider):
        metrics = collected(reader)
        assert metrics.keys() == {
            f"{otel_name(metric)}{part}" for metric in CATALOG for part in PARTS[metric.kind]
        }
        for metric in CATALOG:
            if metric.kind == "histogram":
                continue
            found = metrics[otel_name(metric)]
            assert (found.description, found.unit) == (metric.help, UNITS[metric.unit])
            assert getattr(found.data, "is_monotonic", False) == (metric.kind == "counter")
            for point in found.data.data_points:
                assert set(point.attributes) == set(metric.labels)
        rows = metrics["asyncsplit_rows"].data.data_points
        assert {point.attributes["split"]: point.value for point in rows} == {"0": 50, "1": 7}
        waits = metrics["asyncsplit_batch_wait_seconds_bucket"].data.data_points
        assert {point.attributes["le"]: point.value for point in waits} == {
            **{"0.001": 8, "0.005": 8, "0.01": 10},
            **dict.fromkeys(("0.05", "0.1", "0.5", "1.0", "5.0", "30.0", "120.0", "+Inf"), 10),
        }
    provider.shutdown()


def test_what_is_observed_is_of_the_moment() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    state = busy()
    with outlets(state, meter_provider=lambda: provider):
        before = collected(reader)["asyncsplit_consumer_conflicts"].data.data_points[0].value
        state.conflicts += 1
        after = collected(reader)["asyncsplit_consumer_conflicts"].data.data_points[0].value
    assert after == before + 1
    provider.shutdown()


def test_the_number_of_points_is_bounded() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    state = CoordinatorState.of("id", 1024)
    with outlets(state, meter_provider=lambda: provider):
        points = [len(metric.data.data_points) for metric in collected(reader).values()]
    assert max(points) <= MAX_SPLIT_LABELS
    provider.shutdown()


def test_a_receiver_gets_everything_and_histograms_as_such() -> None:
    state = busy()
    with contextlib.closing(Receiver()) as receiver:
        with outlets(state, otlp_endpoint=receiver.url, push_interval_s=0.01):
            request = receiver.requests.get(timeout=30)
        while not receiver.requests.empty():
            request = receiver.requests.get()  # the last, sent at the end
    (resource,) = request.resource_metrics
    attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert attributes["service.name"] == "asyncsplit"
    (scope,) = resource.scope_metrics
    metrics = {metric.name: metric for metric in scope.metrics}
    assert metrics.keys() == {otel_name(metric) for metric in CATALOG}
    kinds = {"counter": "sum", "gauge": "gauge", "histogram": "histogram"}
    for metric in CATALOG:
        sent = metrics[otel_name(metric)]
        assert (sent.description, sent.unit) == (metric.help, UNITS[metric.unit])
        assert sent.WhichOneof("data") == kinds[metric.kind]
        if metric.kind != "gauge":
            data = getattr(sent, kinds[metric.kind])
            assert data.aggregation_temporality == 2, "cumulative"
            assert metric.kind != "counter" or data.is_monotonic
    (waits,) = metrics["asyncsplit_batch_wait_seconds"].histogram.data_points
    assert (waits.count, waits.sum) == (10, 0.5)
    assert list(waits.bucket_counts) == [8, 0, 2, *[0] * 8]
    (exemplar,) = waits.exemplars
    assert (exemplar.trace_id.hex(), exemplar.span_id.hex()) == ("ab" * 16, "cd" * 8)
    assert exemplar.as_double == 0.009
    assert not waits.HasField("min")
    (epochs,) = metrics["asyncsplit_epoch_duration_seconds"].histogram.data_points
    assert (epochs.count, epochs.sum) == (1, 2.0)


def test_what_is_true_at_the_end_is_pushed() -> None:
    state = busy()
    with contextlib.closing(Receiver()) as receiver:
        with outlets(state, otlp_endpoint=receiver.url, push_interval_s=3600):
            state.conflicts = 9
        request = receiver.requests.get(timeout=30)
    (metric,) = (
        metric
        for metric in request.resource_metrics[0].scope_metrics[0].metrics
        if metric.name == "asyncsplit_consumer_conflicts"
    )
    assert metric.sum.data_points[0].as_int == 9


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("asyncsplit")]
    assert {record.levelno for record in ours} <= {logging.WARNING}
    return [record.getMessage() for record in ours]


def test_a_missing_exporter_is_one_warning_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.metric_exporter", None)
    with outlets(busy(), otlp_endpoint="http://127.0.0.1:1/v1/metrics", push_interval_s=0.01):
        pass
    (warning,) = warnings_of(caplog)
    assert "http://127.0.0.1:1/v1/metrics" in warning
    assert "pip install 'asyncsplit[otel]'" in warning


@pytest.fixture
def lines() -> Iterator[queue.SimpleQueue[str]]:
    """Return what is logged, by anybody, as it comes."""
    logged: queue.SimpleQueue[str] = queue.SimpleQueue()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.put(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield logged
    logging.getLogger().removeHandler(handler)


def test_a_receiver_that_goes_away_and_comes_back_is_two_lines(
    monkeypatch: pytest.MonkeyPatch, lines: queue.SimpleQueue[str]
) -> None:
    # Less than the exporter waits before it tries again, and far more than a push takes.
    monkeypatch.setattr("asyncsplit.telemetry.otel.EXPORT_TIMEOUT_S", 0.75)
    with contextlib.ExitStack() as stack:
        with contextlib.closing(Receiver()) as receiver:
            stack.enter_context(outlets(busy(), otlp_endpoint=receiver.url, push_interval_s=0.01))
            receiver.requests.get(timeout=30)
        gone = lines.get(timeout=30)
        with contextlib.closing(Receiver(receiver.port)) as back:
            returned = lines.get(timeout=30)
            back.requests.get(timeout=30)
            stack.close()
    assert f"Metrics to {receiver.url} do not arrive: " in gone
    assert "Everything else works" in gone
    assert f"Metrics to {receiver.url} arrive again, after " in returned
    assert lines.empty(), "neither ours nor the exporter's"


def test_others_that_use_the_exporter_go_on_logging(lines: queue.SimpleQueue[str]) -> None:
    exporter = logging.getLogger("opentelemetry.exporter.of.somebody")
    with overheard(exporter.name) as said:
        exporter.warning("ours")
        thread = threading.Thread(target=exporter.warning, args=["theirs"])
        thread.start()
        thread.join()
    exporter.warning("later")
    assert said == ["ours"]
    assert [lines.get(timeout=0) for _ in range(2)] == ["theirs", "later"]


def test_a_receiver_that_stays_away_is_told_of_less_and_less_often() -> None:
    complaints = Complaints("Metrics to X", "That is tried again.")
    told = [second for second in range(0, 10_000, 5) if complaints.failed(second, "refused")]
    assert told == [0, 60, 120, 240, 480, 960, 1920, 3840, 7680]
    assert complaints.arrived(10_000) == "Metrics to X arrive again, after 2h46m"
    assert not complaints.failing
    assert complaints.arrived(10_001) is None
    assert complaints.failed(10_002, "refused") is not None, "another failure is news"


@pytest.mark.parametrize("broken", [lambda: 1 / 0, lambda: None], ids=["raises", "none"])
def test_a_broken_meter_provider_is_one_warning(
    broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with outlets(busy(), meter_provider=broken):
        pass
    (warning,) = warnings_of(caplog)
    assert "'flights'" in warning
