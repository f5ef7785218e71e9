"""Jobs whose spans are recorded: they go as without, and what is recorded is whole."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry import spans
from tests.simulation.world import World, fakes_installed, simulate

SEEDS = range(20)


@pytest.fixture(autouse=True)
def fakes() -> Iterator[None]:
    with fakes_installed():
        yield


class Provider:
    """Makes tracers that keep what they record; has nothing to flush."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.get_tracer = self._provider.get_tracer

    @property
    def recorded(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()


def identity(span: ReadableSpan) -> SpanContext:
    context: SpanContext | None = span.context
    assert context is not None
    return context


class BrokenTracer:
    def start_span(self, *_: object, **__: object) -> Any:
        raise RuntimeError("the tracer is broken")


class BrokenProvider:
    def get_tracer(self, *_: object) -> BrokenTracer:
        return BrokenTracer()


def figures(world: World) -> tuple[float, int, int, int]:
    oracle = world.oracle
    return world.loop.time(), world.network.messages, oracle.steps, oracle.redelivered


def traced(provider: object, ratio: float = 1.0) -> TelemetryConfig:
    return TelemetryConfig(
        enabled=False, tracer_provider=lambda: provider, trace_sample_ratio=ratio
    )


def test_spans_change_nothing_and_fit_together() -> None:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        provider = Provider()
        world = simulate(seed, telemetry=traced(provider))
        if not world.plan.ahead:  # who records spans does not arrive early
            assert figures(world) == figures(simulate(seed))
        recorded = provider.recorded
        by_id = {identity(span).span_id: span for span in recorded}
        names = {kind.name: kind for kind in spans.SPANS}
        for span in recorded:
            seen[span.name] += 1
            assert set(span.attributes or ()) <= {one.name for one in names[span.name].attributes}
            if span.name == "asyncsplit.epoch":
                assert span.parent is None
                continue
            assert span.parent is not None
            # The stream of a process that has died is missing, and so is an epoch under way.
            if (parent := by_id.get(span.parent.span_id)) is not None:
                assert identity(parent).trace_id == identity(span).trace_id
                assert f"`{parent.name}`" in names[span.name].parent
                epoch = "asyncsplit.epoch"
                assert (parent.attributes or {})[epoch] == (span.attributes or {})[epoch]
    schema = {"asyncsplit.schema", "asyncsplit.schema_answer"}
    assert seen.keys() == {kind.name for kind in spans.SPANS} - schema


@pytest.mark.parametrize(("provider", "ratio"), [(Provider(), 0.0), (BrokenProvider(), 1.0)])
def test_what_is_not_sampled_or_fails_is_as_if_it_were_off(provider: Any, ratio: float) -> None:
    for seed in SEEDS[:6]:
        world = simulate(seed, telemetry=traced(provider, ratio))
        assert figures(world) == figures(simulate(seed))
    assert not getattr(provider, "recorded", ())
