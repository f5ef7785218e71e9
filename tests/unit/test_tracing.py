"""Spans as an exporter of OpenTelemetry's SDK gets them, and what happens if there is none."""

import contextlib
import logging
import pickle
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry
from prometheus_client import generate_latest as classic
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

from asyncsplit.core.ledger import Ledger
from asyncsplit.core.routing import make_router
from asyncsplit.errors import ConsumerLostError, ExecutionActiveError, StreamClosedError
from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry import spans, tracing
from asyncsplit.telemetry.collector import StateCollector
from asyncsplit.telemetry.counters import Exemplar, StreamTimes
from asyncsplit.telemetry.epoch_spans import FAILED_PULLS, EpochSpans
from asyncsplit.telemetry.spans import Longest
from asyncsplit.telemetry.state import CoordinatorState
from asyncsplit.telemetry.stream_spans import StreamSpans, schema_span
from asyncsplit.telemetry.tracing import Carrier, Tracer, Tracing, carrier_of
from tests.profiles import FEWER
from tests.unit.receiver import Receiver


class Recorder:
    """A provider of the SDK that keeps what it is given."""

    def __init__(self, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, **options)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        """What was recorded, by name without the prefix; at most one of each."""
        found = {span.name.removeprefix("asyncsplit."): span for span in self.all}
        assert len(found) == len(self.all)
        return found

    @property
    def all(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def tracer(self, ratio: float = 1.0) -> Tracer:
        return Tracer(self.provider, ratio, "flights")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@contextlib.contextmanager
def user_span(name: str, *, recorded: bool = True) -> Iterator[Carrier]:
    """A span of the application, current while it lasts."""
    provider = TracerProvider(shutdown_on_exit=False) if recorded else TracerProvider(ALWAYS_OFF)
    with provider.get_tracer("user").start_as_current_span(name) as span:
        yield carrier_of(span)
    provider.shutdown()


def ledger(n: int) -> Ledger:
    return Ledger(n, make_router(n, equal=False, routing="rows", hints=None), 100)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return {
        key.removeprefix("asyncsplit."): value for key, value in (span.attributes or {}).items()
    }


def parent_of(span: ReadableSpan) -> str:
    assert span.parent is not None
    return f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}"


def identity(span: ReadableSpan | Carrier) -> str:
    if isinstance(span, dict):
        return span["traceparent"][3:52]
    assert span.context is not None
    return f"{span.context.trace_id:032x}-{span.context.span_id:016x}"


def stream_in(
    recorder: Recorder | None, parent: Carrier | None = None, split: int = 1
) -> StreamSpans:
    opened: Future[Tracer | None] = Future()
    opened.set_result(None if recorder is None else recorder.tracer())
    config = Tracing(None, None, 1.0, "flights", parent)
    return StreamSpans(config, opened, split, StreamTimes(0.0))


def test_nothing_is_asked_for_by_default() -> None:
    assert Tracing.of(TelemetryConfig(), "flights") is None
    assert Tracing.of(TelemetryConfig(meter_provider=lambda: None), "flights") is None


def test_without_a_tracer_nothing_is_done() -> None:
    epoch = EpochSpans(None, 2)
    epoch.arrived(0, None)
    epoch.opened(0, [0])
    assert epoch.carrier is None
    with epoch.pull(0, 0, {"traceparent": "what is sent all the same"}):
        pass
    epoch.ended("completed", ledger(2), None)
    epoch.close()


def test_what_is_asked_for_comes_with_the_iterator_and_the_callers_span() -> None:
    config = TelemetryConfig(otlp_traces_endpoint="http://localhost:4318/v1/traces")
    assert pickle.loads(pickle.dumps(Tracing.of(config, None))).parent is None
    with user_span("driver") as driver:
        asked = Tracing.of(config, "flights")
    assert asked is not None
    assert asked.parent == driver
    assert pickle.loads(pickle.dumps(asked)) == asked
    assert len(pickle.dumps(asked)) < 500


def test_an_epoch_is_one_tree_in_the_trace_of_whoever_created_the_split(
    recorder: Recorder,
) -> None:
    epoch = EpochSpans(recorder.tracer(), 2)
    with user_span("driver") as driver:
        pass
    epoch.arrived(1, driver)
    epoch.arrived(0, driver)
    epoch.opened(7, [0, 1])
    epoch.executor_starts(7)
    epoch.executor_started(7, None)
    epoch.died(1)
    epoch.replaced(1, driver)
    epoch.ended("completed", ledger(2), None)
    made = recorder.spans
    assert made.keys() == {"epoch", "barrier", "executor_start", "rejoin"}
    assert parent_of(made["epoch"]) == identity(driver)
    for name in ("barrier", "executor_start", "rejoin"):
        assert parent_of(made[name]) == identity(made["epoch"])
    assert attributes(made["epoch"]) == {
        "dataset": "flights",
        "splits": 2,
        "epoch": 7,
        "outcome": "completed",
        "rows": 0,
    }
    assert attributes(made["barrier"])["last_split"] == 0
    assert [attributes(event)["split"] for event in made["barrier"].events] == [1, 0]  # type: ignore[arg-type]
    assert made["epoch"].start_time == made["barrier"].start_time
    assert made["epoch"].start_time == made["barrier"].events[0].timestamp
    assert attributes(made["executor_start"])["ahead"] is False
    assert attributes(made["rejoin"])["reason"] == "consumer_died"
    assert {span.status.status_code for span in recorder.all} == {StatusCode.UNSET}


def test_an_executor_that_is_started_ahead_belongs_to_its_epoch(recorder: Recorder) -> None:
    epoch = EpochSpans(recorder.tracer(), 1)
    epoch.arrived(0, None)
    epoch.opened(0, [0])
    epoch.executor_starts(1)
    epoch.executor_started(1, None)
    epoch.ended("completed", ledger(1), None)
    assert "executor_start" not in recorder.spans
    epoch.arrived(0, None)
    epoch.opened(1, [0])
    epoch.ended("completed", ledger(1), None)
    (start,) = (span for span in recorder.all if span.name == "asyncsplit.executor_start")
    assert (attributes(start)["epoch"], attributes(start)["ahead"]) == (1, True)


def test_what_fails_an_epoch_is_on_its_span(recorder: Recorder) -> None:
    epoch = EpochSpans(recorder.tracer(), 1)
    epoch.opened(0, [0])
    epoch.ended("failed", ledger(1), ValueError("a bad row"))
    failed = recorder.spans["epoch"]
    assert attributes(failed)["outcome"] == "failed"
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.status.description == "ValueError: a bad row"
    (event,) = failed.events
    assert (event.attributes or {})["exception.message"] == "a bad row"


def test_a_barrier_that_never_opens_is_recorded_with_what_its_consumers_are_told(
    recorder: Recorder,
) -> None:
    epoch = EpochSpans(recorder.tracer(), 2)
    epoch.arrived(0, None)
    epoch.gave_up(0, [0], ConsumerLostError("split 1 is missing"))
    for span in recorder.spans.values():
        assert span.status.status_code is StatusCode.ERROR
    assert recorder.spans.keys() == {"epoch", "barrier"}
    assert epoch.carrier is None


def test_to_be_shut_down_is_no_error(recorder: Recorder) -> None:
    epoch = EpochSpans(recorder.tracer(), 1)
    epoch.opened(0, [0])
    epoch.ended("failed", ledger(1), StreamClosedError("the split was shut down"))
    assert recorder.spans["epoch"].status.status_code is StatusCode.UNSET


def test_what_is_under_way_at_the_end_is_sent(recorder: Recorder) -> None:
    epoch = EpochSpans(recorder.tracer(), 1)
    epoch.opened(0, [0])
    epoch.close()
    assert attributes(recorder.spans["epoch"])["outcome"] == "stopped"


def test_long_pulls_and_some_that_fail_are_recorded(recorder: Recorder) -> None:
    epoch = EpochSpans(recorder.tracer(), 1)
    epoch.opened(0, [0])
    assert epoch.carrier is not None
    with epoch.pull(0, 0, epoch.carrier):
        pass
    assert "pull" not in recorder.spans
    epoch._epoch.longest = Longest(10, 0.0)  # type: ignore[union-attr]
    with epoch.pull(0, 0, epoch.carrier) as noted:
        noted[spans.SLICES] = 3
    assert attributes(recorder.spans["pull"]) == {
        "dataset": "flights",
        "split": 0,
        "epoch": 0,
        "slices": 3,
    }
    for _ in range(2 * FAILED_PULLS):
        with pytest.raises(ValueError, match="a bad row"), epoch.pull(0, 0, epoch.carrier):
            raise ValueError("a bad row")
    failed = [span for span in recorder.all if span.status.status_code is StatusCode.ERROR]
    assert len(failed) == FAILED_PULLS


def test_a_stream_has_its_loops_span_as_parent_if_that_is_in_the_epochs_trace(
    recorder: Recorder,
) -> None:
    with user_span("driver") as driver:
        epoch = carrier_of(trace.get_current_span())
        inside = stream_in(recorder)
    inside.started(3, epoch)
    inside.ended(completed=True, rows=10, batches=2)
    made = recorder.spans["stream"]
    assert parent_of(made) == identity(driver)
    assert attributes(made) == {
        "dataset": "flights",
        "split": 1,
        "epoch": 3,
        "outcome": "completed",
        "rows": 10,
        "batches": 2,
        "wait_seconds": 0.0,
    }


def test_a_stream_of_a_loop_in_another_trace_joins_the_epochs_and_links_to_the_loops(
    recorder: Recorder,
) -> None:
    with user_span("loop") as loop:
        stream = stream_in(recorder)
    with user_span("epoch") as epoch:
        pass
    assert stream.arrives_in == loop
    stream.started(3, epoch)
    stream.ended(completed=False, rows=0, batches=0)
    made = recorder.spans["stream"]
    assert parent_of(made) == identity(epoch)
    (link,) = made.links
    assert f"{link.context.span_id:016x}" == loop["traceparent"][36:52]
    assert attributes(made)["outcome"] == "left"


def test_a_stream_records_long_waits_restarts_and_its_error(recorder: Recorder) -> None:
    stream = stream_in(recorder)
    with user_span("epoch") as epoch:
        pass
    stream.started(0, epoch)
    assert stream.carrier is not None
    stream.waits()
    stream._times.waited_for("data", 0.15)
    stream._times.waited_for("transfer", 0.02)
    stream.got(0.2)
    stream.waits()
    stream.got(0.001)
    stream.rejoins()
    stream.started(0, None)
    stream.failed(ValueError("a bad row"))
    stream.ended(completed=True, rows=0, batches=0)
    made = recorder.spans
    assert made.keys() == {"stream", "wait", "rejoin"}
    assert attributes(made["wait"])["cause"] == "data"
    assert made["wait"].end_time is not None
    assert made["wait"].start_time is not None
    assert made["wait"].end_time - made["wait"].start_time >= 200_000_000
    assert attributes(made["rejoin"])["reason"] == "coordinator_restarted"
    assert attributes(made["stream"])["outcome"] == "failed"
    assert made["stream"].status.description == "ValueError: a bad row"
    for name in ("wait", "rejoin"):
        assert parent_of(made[name]) == identity(made["stream"])
    long, short = stream._times.exemplars[5], stream._times.exemplars[0]
    assert f"{long.trace_id}-{long.span_id}" == identity(made["wait"])
    assert f"{short.trace_id}-{short.span_id}" == identity(made["stream"])


@pytest.mark.asyncio
async def test_a_call_for_the_schema_is_recorded_on_both_sides(recorder: Recorder) -> None:
    coordinator = EpochSpans(recorder.tracer(), 1)

    async def ask() -> None:
        async with schema_span(recorder.tracer(), "raise") as call:
            with coordinator.schema("raise", call):
                raise ExecutionActiveError("not now")

    with user_span("caller") as caller, pytest.raises(ExecutionActiveError):
        await ask()
    made = recorder.spans
    assert parent_of(made["schema"]) == identity(caller)
    assert parent_of(made["schema_answer"]) == identity(made["schema"])
    assert {span.status.status_code for span in recorder.all} == {StatusCode.ERROR}
    async with schema_span(None, "raise") as call:
        assert call is None


def test_who_began_the_trace_decides_whether_it_is_recorded(recorder: Recorder) -> None:
    with user_span("not sampled", recorded=False) as dropped:
        assert not int(dropped["traceparent"][-2:], 16) & 1
    with user_span("sampled") as kept:
        pass
    for parent, ratio, recorded in (
        (dropped, 1.0, False),
        (kept, 0.0, True),
        (None, 0.0, False),
        (None, 1.0, True),
    ):
        epoch = EpochSpans(recorder.tracer(ratio), 1)
        epoch.arrived(0, parent)
        epoch.opened(0, [0])
        assert (epoch.carrier is not None) == recorded
        stream = stream_in(recorder)
        stream.started(0, epoch.carrier)
        assert (stream.carrier is not None) == recorded
        assert (stream.flush() is None) == (not recorded)
        stream.got(10.0)
        assert bool(stream._times.exemplars) == recorded


def test_a_providers_own_sampler_counts_too() -> None:
    recorder = Recorder(sampler=ALWAYS_OFF)
    epoch = EpochSpans(recorder.tracer(), 1)
    epoch.opened(0, [0])
    assert epoch.carrier is None


@FEWER
@given(st.lists(st.floats(0, 10_000), max_size=300), st.integers(1, 8))
def test_never_many_are_picked_and_always_the_longest(lengths: list[float], each: int) -> None:
    longest = Longest(each)
    picked = [length for length in lengths if longest.picks(length)]
    assert len(picked) <= each * 17, "10,000 s are 17 times twice 0.1 s"
    if lengths and (worst := max(lengths)) >= spans.LONG_S:
        assert worst in picked


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("asyncsplit")]
    assert {record.levelno for record in ours} <= {logging.WARNING}
    return [record.getMessage() for record in ours]


class Broken:
    """Raises whatever is asked of it."""

    def get_tracer(self, *_: object) -> "Broken":
        return self

    def start_span(self, *_: object, **__: object) -> None:
        raise RuntimeError("the tracer is broken")

    def force_flush(self) -> None:
        raise RuntimeError("so is the flush")


def test_a_tracer_that_raises_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tracing._warn_once.cache_clear()
    epoch = EpochSpans(Tracer(Broken(), 1.0, "flights"), 1)  # type: ignore[arg-type]
    for number in range(3):
        epoch.opened(number, [0])
        epoch.ended("completed", ledger(1), None)
    epoch.close()
    (warning,) = warnings_of(caplog)
    assert "Everything else works" in warning


@pytest.mark.parametrize("broken", [lambda: 1 / 0, lambda: None], ids=["raises", "none"])
def test_a_broken_tracer_provider_is_one_warning(
    broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Tracing.of(TelemetryConfig(tracer_provider=broken), "flights")
    assert asked is not None
    assert asked.open_aside().result(30) is None
    (warning,) = warnings_of(caplog)
    assert "'flights'" in warning


def test_a_missing_exporter_is_one_warning_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "asyncsplit.telemetry.otlp_spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    asked = Tracing.of(TelemetryConfig(otlp_traces_endpoint="http://127.0.0.1:1"), "flights")
    assert asked is not None
    assert asked.open() is None
    (warning,) = warnings_of(caplog)
    assert "pip install 'asyncsplit[otel]'" in warning


def pushing(url: str) -> Tracer:
    asked = Tracing.of(TelemetryConfig(otlp_traces_endpoint=url), "flights")
    assert asked is not None
    tracer = asked.open_aside().result(30)
    assert tracer is not None
    return tracer


def test_a_receiver_gets_them_by_the_time_they_are_flushed() -> None:
    with contextlib.closing(Receiver()) as receiver:
        tracer = pushing(receiver.traces_url)
        epoch = EpochSpans(tracer, 1)
        epoch.opened(0, [0])
        epoch.close()
        request = receiver.traces.get(timeout=0)
        tracer._provider.close()  # type: ignore[attr-defined]
    (resource,) = request.resource_spans
    described = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert described["service.name"] == "asyncsplit"
    names = {span.name for span in resource.scope_spans[0].spans}
    assert names == {"asyncsplit.epoch", "asyncsplit.barrier"}


def test_an_epoch_is_sent_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    with contextlib.closing(Receiver()) as receiver:
        tracer = pushing(receiver.traces_url)
        epoch = EpochSpans(tracer, 1)
        epoch.opened(0, [0])
        epoch.ended("completed", ledger(1), None)
        request = receiver.traces.get(timeout=30)
        tracer._provider.close()  # type: ignore[attr-defined]
    names = {span.name for span in request.resource_spans[0].scope_spans[0].spans}
    assert "asyncsplit.epoch" in names


def test_a_receiver_that_is_not_there_is_one_warning_and_is_not_waited_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("asyncsplit.telemetry.tracing.EXPORT_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1/traces"
    tracer = pushing(url)
    epoch = EpochSpans(tracer, 1)
    epoch.opened(0, [0])
    epoch.ended("completed", ledger(1), None)
    if (flushed := tracer.flush()) is not None:
        flushed.result(30)
    assert tracer.flush() is None
    epoch.opened(1, [0])
    epoch.close()
    tracer._provider.force_flush()  # type: ignore[attr-defined]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert url in warning
    assert "Everything else works" in warning
    began = time.monotonic()
    tracer._provider.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 30, "the SDK's own patience"


def test_exemplars_travel_from_a_wait_to_the_exposition() -> None:
    state = CoordinatorState.of("id", 2, "flights")
    registry = CollectorRegistry()
    registry.register(StateCollector(state))
    for number, (split, seconds) in enumerate([(0, 0.2), (1, 0.4)]):
        state.meet(split, f"consumer {split}", 700)
        times = StreamTimes(0.0)
        times.wait(0.0)
        assert times.got(seconds, batch=True) == seconds
        times.exemplars[5] = Exemplar(5, f"{number:032x}", f"{number:016x}", seconds, 1e9)
        size = {"rows": 10, "batches": 1, "blocks": 1, "size_bytes": 1, "backlog_bytes": 0}
        counters = times.totals(seconds, **size)
        assert times.totals(seconds, **size).exemplars == (), "each is sent once"
        state.update(split, f"consumer {split}", counters)
    text = openmetrics(registry).decode()  # type: ignore[no-untyped-call]
    lines = [line for line in text.splitlines() if " # " in line]
    (line,) = lines
    assert 'le="0.5"} 2.0 # {span_id="0000000000000001",trace_id="' in line
    assert line.endswith(f'trace_id="{1:032x}"}} 0.4 1000000000.0'), "the latest"
    assert " # {" not in classic(registry).decode()
