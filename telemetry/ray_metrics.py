"""The catalog's metrics among Ray's own, for clusters whose Prometheus scrapes Ray already.

Splits are put together: Ray's agent keeps every series it has ever seen, and 2,000 of a metric.
It also distorts the sums of histograms; they go as counters ``_sum`` and ``_count``, without
buckets.
"""

from collections.abc import Callable

import ray
from ray.util.metrics import Counter, Gauge

from asyncsplit.telemetry.catalog import CATALOG, Metric, Observed, Snapshot
from asyncsplit.telemetry.state import CoordinatorState

_OVER_SPLITS: dict[str, Callable[[float, float], float]] = {
    "sum": lambda one, other: one + other,
    "max": max,
    "min": min,
}


class Bridge:
    """Gives one coordinator's metrics to the agent of its node."""

    def __init__(self, state: CoordinatorState) -> None:
        """Prepare to push.

        Raises:
            RuntimeError: If this Ray has no metrics agent, and what is pushed would go nowhere.
        """
        node_id = ray.get_runtime_context().get_node_id()
        ports = [n["MetricsExportPort"] for n in ray.nodes() if n["NodeID"] == node_id]
        if not any(port > 0 for port in ports):
            raise RuntimeError(
                "this Ray exports no metrics, which needs ray[default]: pip install 'ray[default]'"
                " on all nodes"
            )
        self._state = state
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._sent: dict[tuple[str, tuple[str, ...]], float] = {}

    def push(self) -> None:
        """Hand over what is true now: gauges as they are, of counters what came since."""
        snapshot = Snapshot.of(self._state)
        for metric in CATALOG:
            labels = tuple(label for label in metric.labels if label != "split")
            for values, value in without_splits(metric, snapshot).items():
                tags = dict(zip(labels, values, strict=True))
                if isinstance(value, Observed):
                    self._add(f"{metric.name}_sum", metric.help, tags, value.total)
                    self._add(f"{metric.name}_count", metric.help, tags, sum(value.counts))
                elif metric.kind == "counter":
                    # Ray puts the suffix back.
                    self._add(metric.name.removesuffix("_total"), metric.help, tags, value)
                else:
                    if metric.name not in self._gauges:
                        self._gauges[metric.name] = Gauge(metric.name, metric.help, labels)
                    self._gauges[metric.name].set(value, tags)

    def close(self) -> None:
        """Do nothing: Ray goes on with what it has."""

    def _add(self, name: str, text: str, tags: dict[str, str], value: float) -> None:
        if name not in self._counters:
            self._counters[name] = Counter(name, text, tuple(tags))
        key = name, tuple(tags.values())
        more = value - self._sent.get(key, 0)
        if more > 0:  # Ray takes nothing else
            self._counters[name].inc(more, tags)
            self._sent[key] = value


def without_splits(metric: Metric, snapshot: Snapshot) -> "dict[tuple[str, ...], float | Observed]":
    """Return a metric's values with all splits put together, by its other labels."""
    together: dict[tuple[str, ...], float | Observed] = {}
    for labels, value in metric.read(snapshot):
        key = tuple(v for k, v in zip(metric.labels, labels, strict=True) if k != "split")
        before = together.get(key)
        if isinstance(before, float | int) and isinstance(value, float | int):
            value = _OVER_SPLITS[metric.over_splits](before, value)
        together[key] = value
    return together
