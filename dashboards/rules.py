"""Recording rules and alerts: when somebody has to look, and where the runbook says what to do."""

from dataclasses import dataclass
from typing import Any, Literal

from asyncsplit.telemetry.verdict import STALL_HIGH
from dashboards.promql import Promql

RUNBOOK = "docs/runbook.md"
"""Where alerts and dashboards find the runbook, unless the export is told another address."""

STUCK_S = 300
"""A wait that has lasted this long is not a matter of slow data. Training steps are shorter."""
SKEW_RATIO = 0.5
LOOP_LAG_S = 0.5
ITERATOR_BYTES = 8 * 1024
"""An iterator takes less than half of that, whatever the dataset is."""

_ALL = Promql(keep=("job", "dataset"), window="5m")


@dataclass(frozen=True)
class Record:
    """A recording rule."""

    name: str
    expr: str

    def rule(self) -> dict[str, Any]:
        """Return the rule as Prometheus reads it."""
        return {"record": self.name, "expr": self.expr}


@dataclass(frozen=True)
class Alert:
    """An alert; the text of its summary and description is a template of Prometheus'."""

    name: str
    severity: Literal["critical", "warning", "info"]
    expr: str
    hold: str
    """How long it must be so."""
    summary: str
    description: str

    @property
    def runbook_url(self) -> str:
        """Where the runbook tells of this alert."""
        return f"{RUNBOOK}#{self.name.lower()}"

    def rule(self) -> dict[str, Any]:
        """Return the rule as Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.hold,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": self.runbook_url,
            },
        }


STALL = Record(
    "job_dataset:asyncsplit_stall:ratio_rate5m",
    _ALL.share("asyncsplit_wait_seconds_total", "asyncsplit_stream_seconds_total"),
)
LOOP_LAG = Record(
    "job_dataset:asyncsplit_loop_lag_seconds:p99_5m",
    _ALL.quantile(0.99, "asyncsplit_loop_lag_seconds"),
)
RECORDS = (
    STALL,
    LOOP_LAG,
    Record("job_dataset:asyncsplit_rows:rate5m", _ALL.rate("asyncsplit_rows_total")),
    Record("job_dataset:asyncsplit_bytes:rate5m", _ALL.rate("asyncsplit_bytes_total")),
    Record(
        "job_dataset_cause:asyncsplit_stall_seconds:rate5m",
        _ALL.rate("asyncsplit_stall_seconds_total", "cause"),
    ),
    Record(
        "job_dataset_blocked_on:asyncsplit_pump_blocked_seconds:rate5m",
        _ALL.rate("asyncsplit_pump_blocked_seconds_total", "blocked_on"),
    ),
    Record(
        "job_dataset:asyncsplit_batch_wait_seconds:p99_5m",
        _ALL.quantile(0.99, "asyncsplit_batch_wait_seconds"),
    ),
)

_SAME = Promql(keep=(), window="5m", matchers={"job": "=%q", "dataset": "=%q"})
"""For queries in a description, about the dataset that the alert is about."""


def _named(label: str, query: str) -> str:
    """Return a template that writes a label of each of a query's results, a space before each."""
    results = f"range printf `{query}` $labels.job $labels.dataset | query | sortByLabel `{label}`"
    return f"{{{{ {results} }}}} {{{{ .Labels.{label} }}}}{{{{ end }}}}"


_OF = "{{ $labels.dataset }} of job {{ $labels.job }}"
_FOR_NOW = "{{ $value | humanizeDuration }}"
_MISSING = f"{_SAME.series('asyncsplit_split_missing')} == 1"
_CAUSE = f"topk(1, {_SAME.rate('asyncsplit_stall_seconds_total', 'cause')} > 0)"
_AT_BARRIER = _ALL.gauge("asyncsplit_wait_age_seconds", wait='="barrier"')
_STUCK = _ALL.gauge("asyncsplit_wait_age_seconds", "wait", wait='=~"start|lock|dataset"')

ALERTS = (
    Alert(
        "AsyncSplitDataStallHigh",
        "warning",
        f"{STALL.name} > {STALL_HIGH}",
        "10m",
        "Training on {{ $labels.dataset }} waits for data {{ $value | humanizePercentage }} of the"
        " time",
        f"The training loops of dataset {_OF} waited for batches for"
        " {{ $value | humanizePercentage }} of the last 5 minutes of iterating. Most of it was due"
        f" to:{_named('cause', _CAUSE)}.",
    ),
    Alert(
        "AsyncSplitBarrierStuck",
        "critical",
        f"{_AT_BARRIER} > {STUCK_S}",
        "1m",
        "An epoch of {{ $labels.dataset }} cannot begin: splits are missing",
        f"Consumers of dataset {_OF} have waited at the barrier for {_FOR_NOW}. Splits missing,"
        f" the first 8 of them if there are more than 64 splits:{_named('split', _MISSING)}.",
    ),
    Alert(
        "AsyncSplitWaitStuck",
        "critical",
        f"{_STUCK} > {STUCK_S}",
        "1m",
        "{{ $labels.dataset }} has brought no data for {{ $value | humanizeDuration }}",
        f"In the coordinator of dataset {_OF}, one wait has lasted {_FOR_NOW}:"
        " {{ $labels.wait }} (start: for the executor to start; lock: for whoever holds the guard's"
        " lock; dataset: for the next block of the dataset).",
    ),
    Alert(
        "AsyncSplitConsumerSilent",
        "critical",
        f"{_ALL.gauge('asyncsplit_split_silence_seconds', 'split')} > {STUCK_S}",
        "1m",
        "The consumer of split {{ $labels.split }} of {{ $labels.dataset }} is silent",
        f"Nothing has been heard of the consumer of split {{{{ $labels.split }}}} of dataset {_OF}"
        f" for {_FOR_NOW}, and it is its turn. It is dead, stuck, or in a training step that takes"
        " as long.",
    ),
    Alert(
        "AsyncSplitSkewHigh",
        "info",
        f"{_ALL.gauge('asyncsplit_skew_ratio')} > {SKEW_RATIO}",
        "15m",
        "Splits of {{ $labels.dataset }} are far apart",
        f"The slowest split of dataset {_OF} is {{{{ $value | humanizePercentage }}}} of the rows"
        " behind the fastest, for 15 minutes. The others will wait for it.",
    ),
    Alert(
        "AsyncSplitLoopLagHigh",
        "warning",
        f"{LOOP_LAG.name} > {LOOP_LAG_S}",
        "10m",
        "The coordinator of {{ $labels.dataset }} answers late",
        f"One timer in a hundred of the coordinator of dataset {_OF} comes"
        f" {_FOR_NOW} late or more. All consumers wait for its answers.",
    ),
    Alert(
        "AsyncSplitGuardRejections",
        "warning",
        f"{_ALL.increase('asyncsplit_guard_rejections_total', 'operation', window='15m')} > 0",
        "0m",
        "Calls of {{ $labels.operation }} on {{ $labels.dataset }} are rejected",
        "Of the operation {{ $labels.operation }}, about {{ $value | humanize }} calls were"
        f" rejected in 15 minutes: dataset {_OF} was being executed, and they would have executed"
        " it a second time.",
    ),
    Alert(
        "AsyncSplitIteratorGrown",
        "warning",
        f"{_ALL.gauge('asyncsplit_iterator_size_bytes')} > {ITERATOR_BYTES}",
        "0m",
        "The iterator of {{ $labels.dataset }} takes {{ $value | humanize1024 }}B to send",
        f"A consumer of dataset {_OF} got an iterator of {{{{ $value | humanize1024 }}}}B, where"
        " less than 4 KiB are expected: something has been attached to it.",
    ),
    Alert(
        "AsyncSplitRedeliveries",
        "warning",
        f"{_ALL.increase('asyncsplit_redelivered_rows_total', window='15m')} > 0",
        "0m",
        "Rows of {{ $labels.dataset }} were delivered again",
        f"About {{{{ $value | humanize }}}} rows of dataset {_OF} were sent to a split again in 15"
        " minutes: a consumer or the coordinator has been lost.",
    ),
    Alert(
        "AsyncSplitTargetDown",
        "critical",
        'up{job=~".*asyncsplit.*"} == 0',
        "2m",
        "The coordinator at {{ $labels.instance }} cannot be scraped",
        "Prometheus cannot read the metrics of the coordinator at {{ $labels.instance }}, of job"
        " {{ $labels.job }}. No other alert can tell of it now.",
    ),
)


def groups() -> dict[str, Any]:
    """Return all rules, in the form of a rule file."""
    return {
        "groups": [
            {"name": "asyncsplit.records", "rules": [record.rule() for record in RECORDS]},
            {"name": "asyncsplit.alerts", "rules": [alert.rule() for alert in ALERTS]},
        ]
    }
