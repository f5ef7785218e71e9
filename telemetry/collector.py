"""The catalog's metrics as Prometheus reads them, computed when it asks."""

import time
from collections.abc import Iterable
from itertools import accumulate
from typing import TypeAlias

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as ShownExemplar

from asyncsplit.telemetry.catalog import CATALOG, Metric, Observed, Snapshot
from asyncsplit.telemetry.counters import Exemplar
from asyncsplit.telemetry.state import CoordinatorState

PAUSE_S = 5e-5
"""Pause after each metric. A scrape is a thread that does not wait for anything, and would keep the
interpreter from the event loop's thread for 5 milliseconds at a time."""

_Family: TypeAlias = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_FAMILIES: dict[str, type[_Family]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class StateCollector(Collector):
    """Turns a coordinator's plain numbers into metric families, from any thread.

    prometheus_client's own instruments would cost the hot path ten times as much, and give each
    counter a second series, ``_created``.
    """

    def __init__(self, state: CoordinatorState) -> None:
        """Collect from a state; it is read at every scrape, never copied or locked."""
        self._state = state

    def describe(self) -> Iterable[_Family]:
        """Yield the families without their samples."""
        return map(_family, CATALOG)

    def collect(self) -> Iterable[_Family]:
        """Yield one family per metric of the catalog."""
        snapshot = Snapshot.of(self._state)
        for metric in CATALOG:
            family = _family(metric)
            for labels, value in metric.read(snapshot):
                if isinstance(family, HistogramMetricFamily):
                    assert isinstance(value, Observed)
                    family.add_metric(labels, _buckets(metric, value), value.total)
                else:
                    assert not isinstance(value, Observed)
                    family.add_metric(labels, value)
            yield family
            time.sleep(PAUSE_S)


def _family(metric: Metric) -> _Family:
    return _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels, unit=metric.unit)


def bound_labels(metric: Metric) -> list[str]:
    """Return the values of the label ``le``, as Prometheus writes them."""
    return [*map(str, metric.bounds), "+Inf"]


def _buckets(
    metric: Metric, value: Observed
) -> list[tuple[str, float] | tuple[str, float, ShownExemplar]]:
    counts = zip(bound_labels(metric), accumulate(value.counts), strict=True)
    if value.exemplars is None:
        return list(counts)
    return [
        (bound, count, _exemplar(noted))
        if (noted := value.exemplars.get(bucket))
        else (bound, count)
        for bucket, (bound, count) in enumerate(counts)
    ]


def _exemplar(noted: Exemplar) -> ShownExemplar:
    labels = {"trace_id": noted.trace_id, "span_id": noted.span_id}
    return ShownExemplar(labels, noted.seconds, noted.at)
