"""What a split dataset does now, computed from two scrapes of its coordinator's metrics.

Rates are of the time between the two; ages and amounts are those of the later one.
"""

from collections import deque
from typing import Literal, NamedTuple, TypeAlias, get_args

from asyncsplit.telemetry.catalog import MAX_SPLIT_LABELS, WORST
from asyncsplit.telemetry.scrape import Samples

WINDOW_S = 10.0
"""Seconds that rates are of: loops report once a second at most, and steps can take longer."""

SortKey: TypeAlias = Literal[
    "split", "rows", "stall", "wait", "silent", "prefetch", "behind", "lag"
]
SORT_KEYS: tuple[SortKey, ...] = get_args(SortKey)


class Scrape(NamedTuple):
    """What a coordinator served, and when."""

    at: float
    """Seconds of `time.monotonic`."""
    samples: Samples


class SplitRow(NamedTuple):
    """One split; None is what its coordinator does not tell."""

    split: int
    state: str
    rows_per_s: float | None
    stall: float | None
    """Share of the loop's time that it waited for data."""
    wait_s: float | None
    """Age of the wait in progress."""
    silent_s: float | None
    """Seconds without a word from the consumer, while it is its turn."""
    prefetched_bytes: float | None
    behind_rows: float | None
    lag_s: float | None
    """Lag of the consumer's event loop."""


class Present(NamedTuple):
    """A split dataset, now."""

    dataset: str
    versions: str
    splits: int
    epoch: int
    """-1 before the first."""
    phase: str
    """``waiting`` at the barrier, ``starting`` the executor, or ``running``."""
    epoch_s: float
    epochs: dict[str, float]
    """How many have ended, by outcome."""
    epoch_rows: dict[str, float]
    """Rows of the epoch, by where they are."""
    skew: float
    rows_per_s: float | None
    bytes_per_s: float | None
    stall: float | None
    """Share of all loops' time that they waited for data."""
    causes: dict[str, float | None]
    """That share, by what they waited for."""
    blocked: dict[str, float | None]
    """Share of time in which the pump was blocked on the ``dataset``, and on ``consumers``."""
    budget_bytes: float
    """Bytes that may wait for each split."""
    waits: dict[str, float]
    """Ages of the oldest waits in progress."""
    missing: tuple[int, ...]
    """Splits that others wait for at the barrier; of many splits, the first of them."""
    missing_count: int
    rows: tuple[SplitRow, ...]
    """All splits, in the order asked for; of many splits, the worst."""

    @property
    def missing_text(self) -> str:
        """Who is missing, in words."""
        more = ", ..." if self.missing_count > len(self.missing) else ""
        named = ", ".join(map(str, self.missing))
        return f"{self.missing_count} of {self.splits} splits: {named}{more}"


class History:
    """The scrapes of one coordinator that rates need."""

    def __init__(self) -> None:
        """Begin with none."""
        self._scrapes: deque[Scrape] = deque()

    def add(self, scrape: Scrape) -> Samples | None:
        """Add the latest; return the one before it, or None if it is the first of its process."""
        started = "asyncsplit_start_time_seconds"
        previous = self._scrapes[-1].samples if self._scrapes else None
        if previous and previous.total(started) != scrape.samples.total(started):
            self._scrapes.clear()
            previous = None
        self._scrapes.append(scrape)
        while len(self._scrapes) > 2 and self._scrapes[1].at <= scrape.at - WINDOW_S:
            self._scrapes.popleft()
        return previous

    def present(self, sort: SortKey = "split") -> Present:
        """Return what there is to show; there has to be a scrape."""
        return present(self._scrapes[0], self._scrapes[-1], sort)


def present(before: Scrape, after: Scrape, sort: SortKey = "split") -> Present:
    """Return what there is to show.

    Args:
        before: A scrape of the same process; the same scrape if there is no other: without rates.
        after: The latest scrape.
        sort: What to order splits by, the worst first; ``split`` is their number.

    Raises:
        KeyError: If these are not the metrics of a coordinator.
    """
    now, since = after.samples, _Since(before, after)
    streamed = "asyncsplit_stream_seconds_total"
    build = now.labels("asyncsplit_build_info")
    return Present(
        dataset=now.labels("asyncsplit_splits")["dataset"],
        versions=f"asyncsplit {build['version']}, ray {build['ray_version']}",
        splits=int(now.total("asyncsplit_splits")),
        epoch=int(now.total("asyncsplit_epoch")),
        phase=_phase(now),
        epoch_s=now.total("asyncsplit_epoch_age_seconds"),
        epochs=now.by("outcome", "asyncsplit_epochs_total"),
        epoch_rows=now.by("state", "asyncsplit_epoch_rows"),
        skew=now.total("asyncsplit_skew_ratio"),
        rows_per_s=since.rate("asyncsplit_rows_total"),
        bytes_per_s=since.rate("asyncsplit_bytes_total"),
        stall=since.share("asyncsplit_wait_seconds_total", streamed),
        causes={
            cause: since.share("asyncsplit_stall_seconds_total", streamed, cause=cause)
            for cause in now.by("cause", "asyncsplit_stall_seconds_total")
        },
        blocked={
            on: since.rate("asyncsplit_pump_blocked_seconds_total", blocked_on=on)
            for on in now.by("blocked_on", "asyncsplit_pump_blocked_seconds_total")
        },
        budget_bytes=now.total("asyncsplit_prefetch_budget_bytes"),
        waits=now.by("wait", "asyncsplit_wait_age_seconds"),
        missing=tuple(_flagged(now, "asyncsplit_split_missing")),
        missing_count=int(now.total("asyncsplit_barrier_missing_splits")),
        rows=_rows(since, sort),
    )


class _Since:
    """How counters have grown from one scrape to another."""

    def __init__(self, before: Scrape, after: Scrape) -> None:
        self.before, self.after = before.samples, after.samples
        self.seconds = after.at - before.at

    def rate(self, name: str, **labels: str) -> float | None:
        return self._more(name, **labels) / self.seconds if self.seconds > 0 else None

    def share(self, name: str, of: str, *, split: str = "", **labels: str) -> float | None:
        where = {"split": split} if split else {}
        whole = self._more(of, **where)
        return self._more(name, **where, **labels) / whole if whole > 0 else None

    def _more(self, name: str, **labels: str) -> float:
        return self.after.total(name, **labels) - self.before.total(name, **labels)


def _rows(since: _Since, sort: SortKey) -> tuple[SplitRow, ...]:
    now = since.after
    n = int(now.total("asyncsplit_splits"))
    many = n > MAX_SPLIT_LABELS
    gauges = {
        name: now.by("split", f"asyncsplit_split_{name}")
        for name in (
            *("stall_ratio", "wait_age_seconds", "silence_seconds", "prefetched_bytes"),
            *("behind_rows", "loop_lag_seconds", "batch_age_seconds"),
        )
    }
    dead, missing = (set(_flagged(now, f"asyncsplit_split_{name}")) for name in ("dead", "missing"))
    phase = _phase(now)

    def row(split: int) -> SplitRow:
        key = str(split)
        value = {name: gauge.get(key) for name, gauge in gauges.items()}
        if split in dead:
            state = "dead"
        elif split in missing:
            state = "missing"
        else:
            state = _state(phase, value["batch_age_seconds"], value["wait_age_seconds"])
        waited, streamed = "asyncsplit_wait_seconds_total", "asyncsplit_stream_seconds_total"
        return SplitRow(
            split,
            state,
            None if many else since.rate("asyncsplit_rows_total", split=key),
            value["stall_ratio"] if many else since.share(waited, streamed, split=key),
            value["wait_age_seconds"],
            value["silence_seconds"],
            value["prefetched_bytes"],
            value["behind_rows"],
            value["loop_lag_seconds"],
        )

    named = {int(split) for gauge in gauges.values() for split in gauge} | dead | missing
    rows = [row(split) for split in sorted(named)]
    if many:
        # Of these, the endpoint does not tell which splits are worst.
        key: SortKey = "stall" if sort in ("split", "rows", "prefetch") else sort
        return tuple(_sorted(rows, key)[:WORST])
    return tuple(_sorted(rows, sort))


_SORTED_BY: dict[SortKey, tuple[str, int]] = {
    "split": ("split", 1),
    "rows": ("rows_per_s", 1),
    "stall": ("stall", -1),
    "wait": ("wait_s", -1),
    "silent": ("silent_s", -1),
    "prefetch": ("prefetched_bytes", 1),
    "behind": ("behind_rows", -1),
    "lag": ("lag_s", -1),
}


def _sorted(rows: list[SplitRow], sort: SortKey) -> list[SplitRow]:
    field, sign = _SORTED_BY[sort]

    def worst_first(row: SplitRow) -> tuple[bool, float, int]:
        value = getattr(row, field)
        return value is None, 0.0 if value is None else sign * value, row.split

    return sorted(rows, key=worst_first)


def _state(phase: str, reads_since: float | None, waits_since: float | None) -> str:
    if reads_since:
        return "reading"
    if waits_since:
        return "starting" if phase == "starting" else "waiting"
    if reads_since is None or waits_since is None:
        return "-"
    return "done" if phase == "running" else "idle"


def _flagged(samples: Samples, name: str) -> list[int]:
    return sorted(int(split) for split, value in samples.by("split", name).items() if value)


def _phase(samples: Samples) -> str:
    phases = samples.by("phase", "asyncsplit_epoch_phase")
    return max(phases, key=phases.__getitem__)
