"""The catalog's metrics as Prometheus reads them, computed when it asks."""

from collections.abc import Iterable

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncsplit.telemetry.catalog import CATALOG, Snapshot
from asyncsplit.telemetry.state import CoordinatorState

_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class StateCollector(Collector):
    """Turns a coordinator's plain numbers into metric families, from any thread.

    prometheus_client's own instruments would cost the hot path ten times as much, and give each
    counter a second series, ``_created``.
    """

    def __init__(self, state: CoordinatorState) -> None:
        """Collect from a state; it is read at every scrape, never copied or locked."""
        self._state = state

    def collect(self) -> Iterable[Metric]:
        """Yield one family per metric of the catalog."""
        snapshot = Snapshot.of(self._state)
        for metric in CATALOG:
            family = _FAMILIES[metric.kind](
                metric.name, metric.help, labels=metric.labels, unit=metric.unit
            )
            for labels, value in metric.read(snapshot):
                family.add_metric(labels, value)
            yield family
