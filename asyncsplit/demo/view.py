"""Shows the job: live in a terminal, in plain lines elsewhere, and what happened at the end."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from asyncsplit.demo.job import Outcome, Plan
from asyncsplit.demo.record import EpochReport, Progress
from asyncsplit.telemetry.scrape import Samples

PLAIN_EVERY_S = 2.0
"""Seconds between two plain lines of progress."""
PACE_OVER_S = 2.0
"""Seconds that rows per second are averaged over."""


class Pace:
    """Rows per second of each worker, lately."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._past: deque[tuple[float, list[int]]] = deque()

    def rows_per_s(self, now: float, workers: Sequence[Progress]) -> list[float]:
        """Note where all workers are, and return how fast they have come there."""
        rows = [worker.rows for worker in workers]
        self._past.append((now, rows))
        while self._past[0][0] < now - PACE_OVER_S:
            self._past.popleft()
        then, earlier = self._past[0]
        return [
            (after - before) / (now - then) if now > then else 0.0
            for before, after in zip(earlier, rows, strict=True)
        ]


class View:
    """What the user sees while the job runs; use as a context manager."""

    def __init__(self, console: Console, plan: Plan, rows: int) -> None:
        """Show a plan for epochs of so many rows."""
        self._console = console
        self._plan = plan
        self._share = rows // plan.workers
        self._pace = Pace()
        self._began = perf_counter()
        self._plain_at = self._began + PLAIN_EVERY_S
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        """Take the terminal."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the terminal back as it was."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        say(self._console, text)

    def show(self, workers: Sequence[Progress]) -> None:
        """Show the progress of all workers."""
        now = perf_counter()
        rows_per_s = self._pace.rows_per_s(now, workers)
        if self._live is not None:
            self._live.update(Group("", self._table(now, workers, rows_per_s)), refresh=True)
        elif now >= self._plain_at:
            self._plain_at = now + PLAIN_EVERY_S
            self.say(self._line(now, workers, rows_per_s))

    def _headline(self, now: float, workers: Sequence[Progress]) -> str:
        epoch = min(worker.epoch for worker in workers)
        loss = workers[0].loss
        return (
            f"{now - self._began:5.1f} s  epoch {epoch or '-'} of {self._plan.epochs}"
            f"  loss {'-     ' if math.isnan(loss) else f'{loss:.4f}'}"
        )

    def _line(self, now: float, workers: Sequence[Progress], rows_per_s: Sequence[float]) -> str:
        each = (
            f"worker {number}: {pace:,.0f} rows/s, {worker.wait_share:.0%} waiting"
            for number, (worker, pace) in enumerate(zip(workers, rows_per_s, strict=True))
        )
        return "  ".join([self._headline(now, workers), *each])

    def _table(self, now: float, workers: Sequence[Progress], rows_per_s: Sequence[float]) -> Table:
        table = _bare_table(self._headline(now, workers))
        table.add_column("worker", justify="right")
        table.add_column("this epoch")
        for name in ("rows", "rows/s", "waiting for data"):
            table.add_column(name, justify="right", min_width=9)
        for number, (worker, pace) in enumerate(zip(workers, rows_per_s, strict=True)):
            table.add_row(
                str(number),
                ProgressBar(total=self._share, completed=worker.epoch_rows, width=30),
                f"{worker.rows:,}",
                f"{pace:,.0f}",
                f"{worker.wait_share:.0%}",
            )
        return table


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: not wrapped, not coloured in, not read as markup."""
    console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)


def tables(console: Console, outcome: Outcome, dataset_bytes: int) -> None:
    """Print what the workers saw, and what the metrics say."""
    console.print("", _seen(outcome.workers), "", _served(outcome.metrics, dataset_bytes), "")
    if outcome.answers:
        say(console, "What Prometheus says of the whole job", "bold")
        for question, answer, query in outcome.answers:
            say(console, f"{question:<32}{answer}")
            say(console, f"{'':<32}{query}", "dim")
        console.print()


def _seen(workers: Sequence[Sequence[EpochReport]]) -> Table:
    table = _bare_table("What the workers saw")
    for name in ("epoch", "worker", "rows", "batches", "first batch", "waiting", "rows/s", "loss"):
        table.add_column(name, justify="right")
    for epoch, reports in enumerate(zip(*workers, strict=True), 1):
        for worker, report in enumerate(reports):
            table.add_row(
                str(epoch) if not worker else "",
                str(worker),
                f"{len(report.row_ids):,}",
                f"{report.batches:,}",
                f"{report.first_batch_s:.2f} s",
                f"{report.wait_s / report.seconds:.0%}",
                f"{len(report.row_ids) / report.seconds:,.0f}",
                f"{report.loss:.4f}" if not worker else "",
            )
    return table


def _served(metrics: Samples, dataset_bytes: int) -> Table:
    table = _bare_table("What the metrics endpoint served at the end", show_header=False)
    splits = range(int(metrics.total("asyncsplit_splits")))

    def each(name: str, text: Callable[[float], str], of: str | None = None) -> str:
        values = (
            metrics.total(name, split=str(split))
            / (metrics.total(of, split=str(split)) if of else 1)
            for split in splits
        )
        return ", ".join(f"{text(value)} (split {split})" for split, value in enumerate(values))

    def count(name: str, **labels: str) -> str:
        return f"{metrics.total(name, **labels):,.0f}"

    schema = "asyncsplit_schema_cache_requests_total"
    rows = {
        "rows handed to training": each("asyncsplit_rows_total", "{:,.0f}".format),
        "time waiting for data": each(
            "asyncsplit_wait_seconds_total", "{:.0%}".format, of="asyncsplit_stream_seconds_total"
        ),
        "epochs completed": count("asyncsplit_epochs_total", outcome="completed"),
        "rows dropped for equal shares": count("asyncsplit_truncated_rows_total"),
        "serialized iterator": (
            f"{count('asyncsplit_iterator_size_bytes')} bytes"
            f" (the dataset: {dataset_bytes:,} bytes)"
        ),
        "schema cache": (
            f"{count(schema, result='hit')} hit, {count(schema, result='miss')} miss,"
            f" {count(schema, result='observed')} observed in a running epoch"
        ),
        "guard rejections": (
            f"{count('asyncsplit_guard_rejections_total')} (the demo asks on purpose: schema() in a"
            " running epoch could deadlock)"
        ),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _bare_table(title: str, *, show_header: bool = True) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        show_header=show_header,
    )
