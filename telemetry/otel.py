"""The catalog's metrics for OpenTelemetry: observed by a MeterProvider, or pushed as OTLP.

Instruments have the catalog's names without ``_total``; what turns OpenTelemetry's metrics into
Prometheus' puts that back. OpenTelemetry cannot observe histograms. To a MeterProvider they are
counters of observations, ``_bucket`` with the upper bound as the attribute ``le``, ``_count`` and
``_sum``. The export makes its data points itself, so there they are histograms.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

import asyncsplit
from asyncsplit.telemetry.catalog import CATALOG, Metric, Observed, Snapshot, Value
from asyncsplit.telemetry.collector import PAUSE_S, bound_labels
from asyncsplit.telemetry.complaints import overheard
from asyncsplit.telemetry.counters import Exemplar
from asyncsplit.telemetry.state import CoordinatorState

SCOPE = "asyncsplit"

EXPORT_TIMEOUT_S = 5.0
"""How long one export may take, repetitions included."""

_UNITS = {"bytes": "By", "seconds": "s", "ratio": "1", "": ""}

_SAME_MOMENT_S = 0.5
"""Instruments are asked one by one; what is read for one serves others for so long."""

_PAUSE_AFTER = 16
"""Observations after which the event loop's thread gets its turn."""


class _Reading:
    """Reads a state once for all instruments of a collection."""

    def __init__(self, state: CoordinatorState) -> None:
        self._state = state
        self._snapshot = Snapshot.of(state)

    def samples(self, metric: Metric) -> Iterator[tuple[dict[str, str], Value]]:
        """Yield the metric's values with their attributes; pause now and then."""
        if time.monotonic() - self._snapshot.now > _SAME_MOMENT_S:
            self._snapshot = Snapshot.of(self._state)
        for number, (labels, value) in enumerate(metric.read(self._snapshot)):
            if number % _PAUSE_AFTER == 0:
                time.sleep(PAUSE_S)
            yield dict(zip(metric.labels, labels, strict=True)), value


def observe(state: CoordinatorState, provider: MeterProvider) -> None:
    """Create an observable instrument for each metric; a provider keeps them for ever."""
    meter = provider.get_meter(SCOPE, asyncsplit.__version__)
    reading = _Reading(state)
    for metric in CATALOG:
        name, unit = _name(metric), _UNITS[metric.unit]
        if metric.kind == "histogram":
            parts: tuple[tuple[str, str, _Part], ...] = (
                ("bucket", "", _buckets),
                ("count", "", _count),
                ("sum", unit, _total),
            )
            for suffix, unit, part in parts:
                callback = partial(_observe_part, reading, metric, part)
                meter.create_observable_counter(f"{name}_{suffix}", [callback], unit, metric.help)
            continue
        create = (
            meter.create_observable_counter
            if metric.kind == "counter"
            else meter.create_observable_gauge
        )
        create(name, [partial(_observe, reading, metric)], unit, metric.help)


def _observe(reading: _Reading, metric: Metric, _: CallbackOptions) -> Iterable[Observation]:
    for attributes, value in reading.samples(metric):
        assert not isinstance(value, Observed)
        yield Observation(value, attributes)


_Part = Callable[[Metric, Observed], Iterable[tuple[dict[str, str], float]]]


def _observe_part(
    reading: _Reading, metric: Metric, part: _Part, _: CallbackOptions
) -> Iterable[Observation]:
    for attributes, value in reading.samples(metric):
        assert isinstance(value, Observed)
        for more, number in part(metric, value):
            yield Observation(number, attributes | more)


def _buckets(metric: Metric, value: Observed) -> Iterable[tuple[dict[str, str], float]]:
    for bound, count in zip(bound_labels(metric), accumulate(value.counts), strict=True):
        yield {"le": bound}, count


def _count(_: Metric, value: Observed) -> Iterable[tuple[dict[str, str], float]]:
    yield {}, sum(value.counts)


def _total(_: Metric, value: Observed) -> Iterable[tuple[dict[str, str], float]]:
    yield {}, value.total


class Export:
    """Pushes a state's metrics to one OpenTelemetry receiver, with OTLP over HTTP."""

    def __init__(self, state: CoordinatorState, endpoint: str) -> None:
        """Prepare to push; nothing is sent yet.

        Raises:
            ImportError: If the extra ``otel`` is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.sdk.resources import Resource
        except ImportError as error:
            raise ImportError(f"{error}: pip install 'asyncsplit[otel]' on all nodes") from error

        self.endpoint = endpoint
        self._reading = _Reading(state)
        self._exporter = OTLPMetricExporter(endpoint, timeout=EXPORT_TIMEOUT_S)
        self._resource = Resource.create(
            {
                "service.name": SCOPE,
                "service.version": asyncsplit.__version__,
                "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
            }
        )
        self._started_ns = time.time_ns()

    def push(self) -> None:
        """Send what is true now; blocks until it has arrived.

        Raises:
            OSError: If it has not arrived in `EXPORT_TIMEOUT_S`; with why.
        """
        from opentelemetry.sdk.metrics.export import (
            MetricExportResult,
            MetricsData,
            ResourceMetrics,
            ScopeMetrics,
        )
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        now_ns = time.time_ns()
        metrics = [self._metric(metric, now_ns) for metric in CATALOG]
        scope = ScopeMetrics(InstrumentationScope(SCOPE, asyncsplit.__version__), metrics, "")
        data = MetricsData([ResourceMetrics(self._resource, [scope], "")])
        with overheard(self._exporter.__module__) as said:
            result = self._exporter.export(data)
        if result is not MetricExportResult.SUCCESS:
            raise ConnectionError(said[0] if said else f"nothing arrived at {self.endpoint}")

    def close(self) -> None:
        """Give up what is being sent."""
        self._exporter.shutdown()

    def _metric(self, metric: Metric, now_ns: int) -> Any:
        from opentelemetry.sdk.metrics import export as otel

        cumulative = otel.AggregationTemporality.CUMULATIVE
        samples = self._reading.samples(metric)
        points: Any
        if metric.kind == "histogram":
            points = [self._histogram_point(metric, *sample, now_ns) for sample in samples]
            data: Any = otel.Histogram(points, cumulative)
        else:
            points = [
                otel.NumberDataPoint(attributes, self._started_ns, now_ns, value)  # type: ignore[arg-type]
                for attributes, value in samples
            ]
            if metric.kind == "counter":
                data = otel.Sum(points, cumulative, is_monotonic=True)
            else:
                data = otel.Gauge(points)
        return otel.Metric(_name(metric), metric.help, _UNITS[metric.unit], data)

    def _histogram_point(
        self, metric: Metric, attributes: dict[str, str], value: Value, now_ns: int
    ) -> Any:
        from opentelemetry.sdk.metrics.export import HistogramDataPoint

        assert isinstance(value, Observed)
        extreme: Any = None  # least and greatest are not kept
        return HistogramDataPoint(
            attributes,
            self._started_ns,
            now_ns,
            sum(value.counts),
            value.total,
            value.counts,
            metric.bounds,
            extreme,
            extreme,
            [_exemplar(each) for each in (value.exemplars or {}).values()],
        )


def _exemplar(noted: Exemplar) -> Any:
    from opentelemetry.sdk.metrics import Exemplar as SentExemplar

    trace_id, span_id = int(noted.trace_id, 16), int(noted.span_id, 16)
    return SentExemplar({}, noted.seconds, int(noted.at * 1e9), span_id, trace_id)


def _name(metric: Metric) -> str:
    return metric.name.removesuffix("_total")
