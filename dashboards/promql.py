"""PromQL in the catalogue's terms: a query cannot name a metric or label that does not exist."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncsplit.telemetry.catalog import CATALOG, Metric

METRICS: dict[str, Metric] = {metric.name: metric for metric in CATALOG}

_TARGET = ("job", "instance")
"""Labels that Prometheus adds to every series."""


@dataclass(frozen=True)
class Promql:
    """Makes expressions that agree in what they select and in what their results are told by."""

    keep: tuple[str, ...]
    """Labels of every result, of those that the metric has."""
    window: str
    """Range of rates."""
    matchers: Mapping[str, str] = field(default_factory=dict)
    """Operator and value by label, such as ``=~"$job"``, for all metrics with that label."""

    def series(self, name: str, **matchers: str) -> str:
        """Return a selector of a metric's series; ``matchers`` are operators with values."""
        metric = METRICS[name]
        return self._series(metric, "", matchers)

    def rate(self, name: str, *by: str, **matchers: str) -> str:
        """Return how much a counter grows per second."""
        return self._grown("rate", name, self.window, by, matchers)

    def increase(self, name: str, *by: str, window: str = "", **matchers: str) -> str:
        """Return how much a counter has grown over the window, or another one."""
        return self._grown("increase", name, window or self.window, by, matchers)

    def gauge(self, name: str, *by: str, **matchers: str) -> str:
        """Return a gauge, of several splits or coordinators what the catalogue says."""
        metric = self._of_kind(name, "gauge")
        # A restarted coordinator's series is there twice for a while.
        over = "max" if "split" in by else metric.over_splits
        return f"{over} by ({self._by(metric, by)}) ({self._series(metric, '', matchers)})"

    def quantile(self, quantile: float, name: str) -> str:
        """Return a quantile of what a histogram has observed over the window."""
        metric = self._of_kind(name, "histogram")
        buckets = f"rate({self._series(metric, '_bucket', {})}[{self.window}])"
        by = f"{self._by(metric, ())}, le"
        return f"histogram_quantile({quantile:g}, sum by ({by}) ({buckets}))"

    def mean(self, name: str) -> str:
        """Return the mean of what a histogram has observed over the window."""
        metric = self._of_kind(name, "histogram")
        total, count = (
            f"sum by ({self._by(metric, ())})"
            f" (rate({self._series(metric, suffix, {})}[{self.window}]))"
            for suffix in ("_sum", "_count")
        )
        return f"{total} / {count}"

    def share(self, part: str, whole: str, *by: str) -> str:
        """Return how much of one counter's growth another one's is; NaN if neither grows."""
        return f"{self.rate(part, *by)} / {self.rate(whole, *by)}"

    def _grown(
        self, function: str, name: str, window: str, by: tuple[str, ...], matchers: dict[str, str]
    ) -> str:
        metric = self._of_kind(name, "counter")
        grown = f"{function}({self._series(metric, '', matchers)}[{window}])"
        return f"sum by ({self._by(metric, by)}) ({grown})"

    def _of_kind(self, name: str, kind: str) -> Metric:
        metric = METRICS[name]
        if metric.kind != kind:
            raise ValueError(f"{name} is a {metric.kind}, not a {kind}")
        return metric

    def _by(self, metric: Metric, by: tuple[str, ...]) -> str:
        self._check(metric, by)
        kept = [label for label in self.keep if label in (*metric.labels, *_TARGET)]
        return ", ".join([*kept, *by])

    def _series(self, metric: Metric, suffix: str, matchers: Mapping[str, str]) -> str:
        self._check(metric, matchers)
        common = {
            label: match
            for label, match in self.matchers.items()
            if label in (*metric.labels, *_TARGET)
        }
        selected = ", ".join(f"{label}{match}" for label, match in {**common, **matchers}.items())
        return f"{metric.name}{suffix}" + (f"{{{selected}}}" if selected else "")

    def _check(self, metric: Metric, labels: tuple[str, ...] | Mapping[str, str]) -> None:
        if unknown := set(labels) - set(metric.labels):
            raise ValueError(f"{metric.name} has no label {', '.join(sorted(unknown))}")
