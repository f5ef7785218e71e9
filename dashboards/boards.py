"""The three dashboards: which panels they have, and what each is for.

Their metrics, and what these mean, come from the catalogue.
"""

from dataclasses import dataclass, field
from typing import Literal

from asyncsplit.telemetry import spans
from asyncsplit.telemetry.catalog import MAX_SPLIT_LABELS, WORST, Board
from asyncsplit.telemetry.verdict import STALL_HIGH
from dashboards import rules
from dashboards.promql import Promql

Q = Promql(
    keep=("dataset",),
    window="$__rate_interval",
    matchers={"job": '=~"$job"', "dataset": '=~"$dataset"'},
)
_WAITS_OF_COORDINATOR = '=~"lock|loop|dataset|consumers|start"'


@dataclass(frozen=True)
class Query:
    """One query of a panel, and what its series are called there."""

    expr: str
    legend: str
    unit: str | None = None
    """If it is not the panel's."""
    one: str | None = None
    """What a value of 1 is written as, if the series' name tells all."""
    exemplars: bool = False
    """Whether single observations are drawn that lead to a trace."""


@dataclass(frozen=True)
class Panel:
    """A panel; of the same title as in the catalogue, if it shows metrics of the catalogue."""

    title: str
    unit: str
    hint: str
    """How to read it."""
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "table"] = "timeseries"
    width: int = 8
    limits: tuple[float, ...] = ()
    """From where on it is yellow and red; red only, if there is one."""
    alert: str | None = None
    """Name of the alert about it."""
    traces: str | None = None
    """TraceQL that finds the spans it is about."""
    stacked: bool = False
    bars: bool = False
    top: float | None = None
    """Upper end of the axis."""


@dataclass(frozen=True)
class Row:
    """A row of panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """A dashboard; its uid stays the same for ever, since links lead to it."""

    board: Board
    description: str
    rows: tuple[Row, ...] = field(repr=False)

    @property
    def uid(self) -> str:
        """Name in addresses, and of the file."""
        return f"asyncsplit-{self.board}"

    @property
    def has_traces(self) -> bool:
        """Whether some panel leads to traces."""
        return any(panel.traces is not None for row in self.rows for panel in row.panels)

    @property
    def title(self) -> str:
        """Name for people."""
        return f"asyncsplit: {self.board.capitalize()}"


def _split_gauge(name: str, legend: str = "") -> Query:
    label = f"{{{{dataset}}}} split {{{{split}}}}{' ' + legend if legend else ''}"
    return Query(Q.gauge(name, "split"), label)


def _column(name: str, title: str, unit: str = "short") -> Query:
    return Query(Q.gauge(name, "split"), title, unit)


def _split_rate(name: str) -> Query:
    return Query(Q.rate(name, "split"), "{{dataset}} split {{split}}")


def _events(name: str, legend: str, *by: str) -> Query:
    return Query(Q.increase(name, *by), f"{{{{dataset}}}} {legend}")


def _quantiles(name: str, *, exemplars: bool = False) -> tuple[Query, ...]:
    return (
        Query(Q.quantile(0.5, name), "{{dataset}} half of them"),
        Query(Q.quantile(0.99, name), "{{dataset}} 99 of 100", exemplars=exemplars),
        Query(Q.mean(name), "{{dataset}} mean"),
    )


OVERVIEW = Dashboard(
    "overview",
    "Is training waiting for data, on which split, and why?",
    (
        Row(
            "Is training waiting for data?",
            (
                Panel(
                    "Data stall",
                    "percentunit",
                    "Share of their time that training loops wait for batches, and that they"
                    " train. Waiting that goes on now shows in *Waits in progress* only: loops"
                    " report between batches.",
                    (
                        Query(
                            Q.share(
                                "asyncsplit_wait_seconds_total", "asyncsplit_stream_seconds_total"
                            ),
                            "{{dataset}} waiting",
                        ),
                        Query(
                            Q.share(
                                "asyncsplit_training_seconds_total",
                                "asyncsplit_stream_seconds_total",
                            ),
                            "{{dataset}} training",
                        ),
                    ),
                    limits=(STALL_HIGH,),
                    alert="AsyncSplitDataStallHigh",
                    top=1,
                ),
                Panel(
                    "Rows per second",
                    "rowsps",
                    "Rows that training loops get. Flat at zero with an epoch under way: look at"
                    " *Waits in progress*.",
                    (Query(Q.rate("asyncsplit_rows_total"), "{{dataset}}"),),
                ),
                Panel(
                    "Wait per batch",
                    "s",
                    "How long a loop waits for one batch, the ones that were ready included. With"
                    " traces on, points are single waits: each leads to its trace.",
                    _quantiles("asyncsplit_batch_wait_seconds", exemplars=True),
                    traces=f'{{ name = "{spans.WAIT_SPAN.name}" && duration > 1s }}',
                ),
            ),
        ),
        Row(
            "On which split?",
            (
                Panel(
                    "Data stall of the worst splits",
                    "percentunit",
                    "The five splits whose loops wait most. One alone: look at its worker and"
                    " node. All alike: the dataset is too slow, see *Bottleneck*.",
                    (
                        Query(
                            f"topk(5, {Q.gauge('asyncsplit_split_stall_ratio', 'split')})",
                            "{{dataset}} split {{split}}",
                        ),
                    ),
                    limits=(STALL_HIGH,),
                    top=1,
                ),
                Panel(
                    "Missing at the barrier",
                    "short",
                    "Who keeps the next epoch from beginning. Nothing is drawn for splits that"
                    " have arrived.",
                    (
                        Query(Q.gauge("asyncsplit_barrier_missing_splits"), "{{dataset}} in all"),
                        Query(
                            f"{Q.gauge('asyncsplit_split_missing', 'split')} > 0",
                            "{{dataset}} split {{split}}",
                        ),
                    ),
                    alert="AsyncSplitBarrierStuck",
                ),
                Panel(
                    "Skew between splits",
                    "percentunit",
                    'High for long: one worker is slower than others. With `routing="demand"` that'
                    " is as it should be; else all will wait for it.",
                    (Query(Q.gauge("asyncsplit_skew_ratio"), "{{dataset}}"),),
                    limits=(rules.SKEW_RATIO,),
                    alert="AsyncSplitSkewHigh",
                    top=1,
                ),
            ),
        ),
        Row(
            "Why?",
            (
                Panel(
                    "Data stall by cause",
                    "s",
                    "Seconds waited per second, over all splits. Barrier: another worker is"
                    " missing, or the executor starts. Data: the dataset is too slow. Transfer:"
                    " the network. Conversion: making batches of blocks.",
                    (
                        Query(
                            Q.rate("asyncsplit_stall_seconds_total", "cause"),
                            "{{dataset}} {{cause}}",
                        ),
                    ),
                    alert="AsyncSplitDataStallHigh",
                    stacked=True,
                ),
                Panel(
                    "Bottleneck",
                    "percentunit",
                    "What the pump waits for. Mostly the dataset: data is the bottleneck. Mostly"
                    " consumers: training is, and data comes fast enough.",
                    (
                        Query(
                            Q.rate("asyncsplit_pump_blocked_seconds_total", "blocked_on"),
                            "{{dataset}} blocked on {{blocked_on}}",
                        ),
                    ),
                    top=1,
                ),
                Panel(
                    "Waits in progress",
                    "s",
                    "It grows while something waits, also while everything hangs. To wait for"
                    " consumers is healthy; pull, dataset, start, lock and barrier are not, if it"
                    " takes minutes.",
                    (
                        Query(
                            Q.gauge("asyncsplit_wait_age_seconds", "wait"), "{{dataset}} {{wait}}"
                        ),
                    ),
                    limits=(rules.STUCK_S,),
                    alert="AsyncSplitWaitStuck",
                ),
            ),
        ),
        Row(
            "How far is it?",
            (
                Panel(
                    "Splits",
                    "short",
                    "Not the number you expect: another job has the same dataset name.",
                    (Query(Q.gauge("asyncsplit_splits"), "{{dataset}}"),),
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Epochs",
                    "short",
                    "The epoch under way, what is being done and since when; and how epochs ended"
                    " in the time shown.",
                    (
                        Query(Q.gauge("asyncsplit_epoch"), "{{dataset}} epoch"),
                        Query(Q.gauge("asyncsplit_epoch_age_seconds"), "{{dataset}} age", unit="s"),
                        Query(
                            f"{Q.gauge('asyncsplit_epoch_phase', 'phase')} > 0",
                            "{{dataset}} {{phase}}",
                            one="now",
                        ),
                        Query(
                            Q.increase("asyncsplit_epochs_total", "outcome", window="$__range"),
                            "{{dataset}} {{outcome}}",
                        ),
                    ),
                    kind="stat",
                    width=8,
                ),
                Panel(
                    "Rows of the epoch",
                    "short",
                    "Unassigned and leased rows are on their way; committed ones are done with.",
                    (Query(Q.gauge("asyncsplit_epoch_rows", "state"), "{{dataset}} {{state}}"),),
                    width=6,
                    stacked=True,
                ),
                Panel(
                    "Time to the first batch",
                    "s",
                    "What every epoch costs before anybody trains. Nothing is drawn while no epoch"
                    " begins.",
                    _quantiles("asyncsplit_first_batch_seconds"),
                    width=6,
                ),
                Panel(
                    "Bytes per second",
                    "Bps",
                    "Bytes of blocks that consumers begin to make batches of.",
                    (Query(Q.rate("asyncsplit_bytes_total"), "{{dataset}}"),),
                    width=24,
                ),
            ),
        ),
    ),
)

COORDINATOR = Dashboard(
    "coordinator",
    "What the coordinator does: lock, guard, schema cache, barrier, event loop and pump.",
    (
        Row(
            "Present",
            (
                Panel(
                    "Versions",
                    "short",
                    "More than one: jobs of different versions run.",
                    (
                        Query(
                            Q.gauge("asyncsplit_build_info", "version", "ray_version"),
                            "asyncsplit {{version}}, Ray {{ray_version}}",
                            one="runs",
                        ),
                    ),
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Up since",
                    "dateTimeFromNow",
                    "Later than the job began: Ray has restarted the coordinator.",
                    (Query(f"1000 * {Q.gauge('asyncsplit_start_time_seconds')}", "{{dataset}}"),),
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Waits of the coordinator",
                    "s",
                    "What it waits for now. For consumers is healthy; loop means that its event"
                    " loop does not run at all.",
                    (
                        Query(
                            Q.gauge(
                                "asyncsplit_wait_age_seconds", "wait", wait=_WAITS_OF_COORDINATOR
                            ),
                            "{{dataset}} {{wait}}",
                        ),
                    ),
                    limits=(rules.STUCK_S,),
                    alert="AsyncSplitWaitStuck",
                ),
                Panel(
                    "Event-loop lag",
                    "s",
                    "It answers all consumers on one event loop. Lag there is latency for all.",
                    _quantiles("asyncsplit_loop_lag_seconds"),
                    limits=(rules.LOOP_LAG_S,),
                    alert="AsyncSplitLoopLagHigh",
                ),
            ),
        ),
        Row(
            "Epochs",
            (
                Panel(
                    "Barrier",
                    "s",
                    "How long the first to arrive waited for the last, and how many arrive per"
                    " second.",
                    (
                        *_quantiles("asyncsplit_barrier_wait_seconds"),
                        Query(
                            Q.rate("asyncsplit_barrier_arrivals_total"),
                            "{{dataset}} arrivals",
                            unit="ops",
                        ),
                    ),
                    limits=(rules.STUCK_S,),
                    alert="AsyncSplitBarrierStuck",
                ),
                Panel(
                    "Executor",
                    "s",
                    "How long Ray Data takes to start the execution of the dataset, and the state"
                    " of its executor (1 for the one that it is in).",
                    (
                        *_quantiles("asyncsplit_executor_start_seconds"),
                        Query(
                            f"{Q.gauge('asyncsplit_executor_state', 'state')} > 0",
                            "{{dataset}} {{state}}",
                            unit="short",
                        ),
                    ),
                ),
                Panel(
                    "Duration of epochs",
                    "s",
                    "Epochs that ended in the time before each point. Nothing is drawn where none"
                    " did.",
                    _quantiles("asyncsplit_epoch_duration_seconds"),
                ),
            ),
        ),
        Row(
            "Pump and memory",
            (
                Panel(
                    "Pump",
                    "percentunit",
                    "What the thread that takes blocks from Ray Data waits for: the dataset, or"
                    " consumers to have room. The rest of its time it works, or there is no epoch.",
                    (
                        Query(
                            Q.rate("asyncsplit_pump_blocked_seconds_total", "blocked_on"),
                            "{{dataset}} blocked on {{blocked_on}}",
                        ),
                    ),
                    stacked=True,
                    top=1,
                ),
                Panel(
                    "Bytes held",
                    "bytes",
                    "Blocks in Ray's object store that asyncsplit holds on to.",
                    (
                        Query(Q.gauge("asyncsplit_leased_bytes"), "{{dataset}} leased"),
                        Query(Q.gauge("asyncsplit_unassigned_bytes"), "{{dataset}} unassigned"),
                    ),
                    stacked=True,
                ),
                Panel(
                    "Truncated and padded rows",
                    "short",
                    "Rows that nobody gets, and rows that are given twice, in the interval before"
                    ' each point. With `equal=True`, or `equal="pad"`, fewer than there are splits'
                    " in each epoch.",
                    (
                        _events("asyncsplit_truncated_rows_total", "{{reason}}", "reason"),
                        _events("asyncsplit_padded_rows_total", "padded"),
                    ),
                    bars=True,
                ),
            ),
        ),
        Row(
            "Lock, guard and schema",
            (
                Panel(
                    "Guard",
                    "percentunit",
                    "Share of the time that the guard's lock is held; how often per second it is"
                    " taken; and operations it rejected.",
                    (
                        Query(Q.rate("asyncsplit_guard_lock_seconds_total"), "{{dataset}} held"),
                        Query(
                            Q.rate("asyncsplit_guard_locks_total"), "{{dataset}} taken", unit="ops"
                        ),
                        Query(
                            Q.increase("asyncsplit_guard_rejections_total", "operation"),
                            "{{dataset}} {{operation}} rejected",
                            unit="short",
                        ),
                    ),
                    alert="AsyncSplitGuardRejections",
                ),
                Panel(
                    "Schema cache",
                    "short",
                    "Requests for the schema in the interval before each point.",
                    (_events("asyncsplit_schema_cache_requests_total", "{{result}}", "result"),),
                    bars=True,
                ),
                Panel(
                    "Serialized iterator",
                    "bytes",
                    "What travels to a worker. It does not depend on the dataset; if it grows,"
                    " something is attached to it.",
                    (
                        Query(Q.gauge("asyncsplit_iterator_size_bytes"), "{{dataset}} one"),
                        Query(
                            Q.increase("asyncsplit_iterator_serialized_bytes_total"),
                            "{{dataset}} all together",
                        ),
                        Query(
                            Q.increase("asyncsplit_iterator_serializations_total"),
                            "{{dataset}} how many",
                            unit="short",
                        ),
                    ),
                    limits=(rules.ITERATOR_BYTES,),
                    alert="AsyncSplitIteratorGrown",
                ),
            ),
        ),
        Row(
            "What was lost?",
            (
                Panel(
                    "Losses",
                    "short",
                    "All zero in a quiet run. Each bar is what happened in the interval before it.",
                    (
                        Query(
                            Q.increase("asyncsplit_redelivered_rows_total"),
                            "{{dataset}} rows redelivered",
                            unit="suffix: rows",
                        ),
                        _events("asyncsplit_rejoins_total", "rejoined, {{reason}}", "reason"),
                        _events("asyncsplit_consumer_deaths_total", "consumers died"),
                        _events("asyncsplit_consumers_lost_total", "consumers given up"),
                        _events("asyncsplit_fenced_messages_total", "messages refused"),
                        _events("asyncsplit_consumer_conflicts_total", "consumers sent away"),
                    ),
                    width=24,
                    alert="AsyncSplitRedeliveries",
                    bars=True,
                ),
            ),
        ),
    ),
)

SPLITS = Dashboard(
    "splits",
    "Each split's worker: laggards, skew, and who is silent. With more than"
    f" {MAX_SPLIT_LABELS} splits, the {WORST} worst of each kind.",
    (
        Row(
            "Laggards",
            (
                Panel(
                    "Splits side by side",
                    "short",
                    "One line for each split, the one that waits most on top.",
                    (
                        _column("asyncsplit_split_stall_ratio", "Data stall", "percentunit"),
                        _column("asyncsplit_split_behind_rows", "Rows behind"),
                        _column("asyncsplit_split_batch_age_seconds", "Last batch", "s"),
                        _column("asyncsplit_split_silence_seconds", "Silence", "s"),
                        _column("asyncsplit_split_loop_lag_seconds", "Loop lag", "s"),
                        _column("asyncsplit_split_dead", "Dead"),
                    ),
                    kind="table",
                    width=24,
                ),
                Panel(
                    "Data stall by split",
                    "percentunit",
                    "One line above the others: that worker, its node or its network. All of"
                    " them: the dataset.",
                    (_split_gauge("asyncsplit_split_stall_ratio"),),
                    limits=(STALL_HIGH,),
                    alert="AsyncSplitDataStallHigh",
                    top=1,
                ),
                Panel(
                    "Rows behind",
                    "short",
                    "A line that rises all through an epoch is a slow worker.",
                    (_split_gauge("asyncsplit_split_behind_rows"),),
                    alert="AsyncSplitSkewHigh",
                ),
                Panel(
                    "Share of batches that were not ready",
                    "percentunit",
                    "Of the batches that a loop asked for. Many short waits can be a small stall.",
                    (
                        Query(
                            Q.share(
                                "asyncsplit_waited_batches_total",
                                "asyncsplit_batches_total",
                                "split",
                            ),
                            "{{dataset}} split {{split}}",
                        ),
                    ),
                    top=1,
                ),
            ),
        ),
        Row(
            "Who is stuck, silent or dead?",
            (
                Panel(
                    "Silence",
                    "s",
                    "Whoever should say something and does not.",
                    (_split_gauge("asyncsplit_split_silence_seconds"),),
                    limits=(rules.STUCK_S,),
                    alert="AsyncSplitConsumerSilent",
                ),
                Panel(
                    "Seconds since the last batch",
                    "s",
                    "A saw of small teeth is a healthy split; a straight rise is one without"
                    " batches.",
                    (_split_gauge("asyncsplit_split_batch_age_seconds"),),
                    limits=(rules.STUCK_S,),
                    alert="AsyncSplitConsumerSilent",
                ),
                Panel(
                    "Waits in progress by split",
                    "s",
                    "Whoever waits is not to blame; look at who does not.",
                    (_split_gauge("asyncsplit_split_wait_age_seconds"),),
                    limits=(rules.STUCK_S,),
                ),
                Panel(
                    "Dead and not replaced",
                    "short",
                    "Nothing at 1: all workers live.",
                    (_split_gauge("asyncsplit_split_dead"),),
                    limits=(1,),
                    alert="AsyncSplitConsumerSilent",
                    top=1,
                ),
                Panel(
                    "Event-loop lag of consumers",
                    "s",
                    "High: training, or another task, blocks the event loop of that worker, so that"
                    " its requests leave late.",
                    (_split_gauge("asyncsplit_split_loop_lag_seconds"),),
                    limits=(rules.LOOP_LAG_S,),
                ),
                Panel(
                    "Ready batches in a row",
                    "short",
                    "A line that only rises never waits.",
                    (_split_gauge("asyncsplit_split_ready_batches"),),
                ),
            ),
        ),
        Row(
            "Throughput and memory",
            (
                Panel(
                    "Batches per second",
                    "ops",
                    "The pace of each worker.",
                    (_split_rate("asyncsplit_batches_total"),),
                ),
                Panel(
                    "Blocks per second",
                    "ops",
                    "Many more than batches: the dataset's blocks are small.",
                    (_split_rate("asyncsplit_blocks_total"),),
                ),
                Panel(
                    "Bytes waiting",
                    "bytes",
                    "At the budget: the split has all it may have. At zero: it lives from hand to"
                    " mouth.",
                    (
                        _split_gauge("asyncsplit_split_waiting_bytes", "waiting"),
                        _split_gauge("asyncsplit_split_prefetched_bytes", "at the consumer"),
                        Query(Q.gauge("asyncsplit_prefetch_budget_bytes"), "{{dataset}} budget"),
                    ),
                ),
                Panel(
                    "Blocks by location",
                    "ops",
                    "Remote blocks go over the network before they are read. Many of them, and a"
                    " stall by transfer: give `locality_hints`, or prefetch more batches.",
                    (
                        Query(
                            Q.rate("asyncsplit_located_blocks_total", "location"),
                            "{{dataset}} {{location}}",
                        ),
                    ),
                    width=24,
                    stacked=True,
                ),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, COORDINATOR, SPLITS)
