"""How `asyncsplit top` looks: in colours on a terminal, in plain text elsewhere. Needs rich."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from asyncsplit.telemetry.present import Present, SplitRow
from asyncsplit.telemetry.troubles import SILENT_S, age
from asyncsplit.telemetry.verdict import STALL_HIGH, verdict

STALL_VERY_HIGH = 0.5
"""Share of data stall that is red and no longer yellow."""
FEWEST_ROWS = 3
"""Splits shown of each dataset, however low the terminal is."""
GAP = 2


@dataclass(frozen=True)
class Section:
    """One coordinator, as far as it is known."""

    url: str
    now: Present | None = None
    problem: str | None = None
    """Why there is nothing newer."""
    troubles: Sequence[str] = ()


@dataclass(frozen=True)
class Screen:
    """All coordinators; drawn anew for each size of the terminal."""

    sections: Sequence[Section]
    footer: str = ""
    fit: bool = True
    """Leave out splits that there is no room for, and group digits for people."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw."""
        drawn = [_Drawn.of(section) for section in self.sections]
        room = None
        if self.fit and drawn:
            around = sum(len(one.above) + len(one.below) + 3 for one in drawn) + 1
            room = max(FEWEST_ROWS, ((options.height or console.height) - around) // len(drawn))
        for number, (section, one) in enumerate(zip(self.sections, drawn, strict=True)):
            if number:
                yield Text()
            yield from one.above
            if section.now is not None:
                rows = section.now.rows[:room]
                yield _table(rows, options.max_width, fit=self.fit)
                if more := section.now.splits - len(rows):
                    yield _line((f"and {more} more splits", "dim"))
            yield from one.below
        if self.footer:
            yield Text()
            yield _line((self.footer, "dim"))


class _Drawn(NamedTuple):
    above: list[Text]
    below: list[Text]

    @classmethod
    def of(cls, section: Section) -> "_Drawn":
        problem = [_line((section.problem, "bold red"))] if section.problem else []
        now = section.now
        if now is None:
            return cls([_line((section.url, "bold")), *problem], [])
        title = _line(
            (now.dataset, "bold"),
            f"  {now.splits} splits  {section.url}",
            (f"  {now.versions}", "dim"),
        )
        head = [_line((f"{name:<9}", "dim"), *parts) for name, *parts in _head(now)]
        return cls(
            [title, *problem, *head],
            [_line((f"! {trouble}", "yellow")) for trouble in section.troubles],
        )


_Part = str | tuple[str, str]


def _head(now: Present) -> Iterator[tuple[str, _Part]]:
    if now.epoch < 0:
        yield "epoch", "none yet"
    else:
        since = f" for {age(now.epoch_s)}" if now.epoch_s else ""
        ended = ", ".join(f"{count:.0f} {outcome}" for outcome, count in now.epochs.items())
        over = now.phase == "waiting" and not now.missing_count
        phase = "nobody waits for the next one" if over else f"{now.phase}{since}"
        yield "epoch", f"{now.epoch}, {phase}; {ended}"
    yield "rows", ", ".join(f"{count:,.0f} {state}" for state, count in now.epoch_rows.items())
    yield (
        "speed",
        f"{_count(now.rows_per_s)} rows/s, {_size(now.bytes_per_s)}/s; skew {_percent(now.skew)}",
    )
    causes = ", ".join(f"{cause} {_percent(share)}" for cause, share in now.causes.items())
    yield "stall", (f"{_percent(now.stall)}: {causes}", _stall_style(now.stall))
    blocked = ", ".join(f"on {on} {_percent(share)}" for on, share in now.blocked.items())
    yield "pump", f"blocked {blocked}"
    yield "limit", verdict(now.stall, now.causes, now.blocked)
    if now.missing_count:
        yield (
            "barrier",
            (f"waiting for {now.missing_text}, {age(now.waits['barrier'])}", "bold red"),
        )
    else:
        yield "barrier", "nobody is missing"


class _Column(NamedTuple):
    name: str
    width: int


_COLUMNS = (
    *(_Column("split", 5), _Column("state", 8), _Column("rows/s", 9), _Column("stall", 5)),
    *(_Column("wait", 6), _Column("silent", 6), _Column("prefetch", 8), _Column("behind", 8)),
    _Column("lag", 6),
)


def _table(rows: Iterable[SplitRow], width: int, *, fit: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    columns = list(_COLUMNS)
    # The last ones matter least, on a terminal that is too narrow for all.
    while fit and len(columns) > 1 and sum(one.width + GAP for one in columns) - GAP > width:
        columns.pop()
    for name, least in columns:
        left = name == "state"
        table.add_column(name, justify="left" if left else "right", min_width=least, no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, fit=fit)[: len(columns)])
    return table


_STATES = {"dead": "bold red", "missing": "bold red", "waiting": "yellow", "starting": "yellow"}


def _cells(row: SplitRow, *, fit: bool) -> tuple[Text, ...]:
    silent = "bold red" if (row.silent_s or 0) > SILENT_S else ""
    return (
        Text(str(row.split)),
        Text(row.state, _STATES.get(row.state, "")),
        Text(_count(row.rows_per_s, commas=fit)),
        Text(_percent(row.stall), _stall_style(row.stall)),
        Text("-" if row.wait_s is None else age(row.wait_s)),
        Text("-" if row.silent_s is None else age(row.silent_s), silent),
        Text(_size(row.prefetched_bytes)),
        Text(_count(row.behind_rows, commas=fit)),
        Text("-" if row.lag_s is None else f"{1000 * row.lag_s:.0f}ms"),
    )


def _line(*parts: _Part) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _stall_style(share: float | None) -> str:
    if share is None or share < STALL_HIGH:
        return ""
    return "yellow" if share < STALL_VERY_HIGH else "bold red"


def _count(value: float | None, *, commas: bool = True) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if commas else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _size(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{value:.0f}{unit}" if unit == "B" or value >= 9.95 else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}GiB"
