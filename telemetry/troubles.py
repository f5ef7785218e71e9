"""What deserves a warning, read from the metrics of a split dataset."""

from collections.abc import Iterator

from asyncsplit.telemetry.present import Present
from asyncsplit.telemetry.scrape import Samples

BARRIER_S = 5.0
SILENT_S = 30.0
WAIT_S = 30.0
LOOP_S = 2.0
"""Ages from which on a wait is worth a warning to somebody who looks on. The alerts leave more
time, since they get people out of bed."""

_WAITS = {
    "start": "for the start of the executor",
    "lock": "for whoever holds the guard's lock",
    "dataset": "for the dataset's next block",
}

_COUNTED = (
    ("asyncsplit_consumer_deaths_total", "", "consumers died"),
    ("asyncsplit_consumers_lost_total", "", "consumers were given up"),
    ("asyncsplit_consumer_conflicts_total", "", "consumers found their split taken"),
    ("asyncsplit_rejoins_total", "reason", "consumers went on in the middle of an epoch"),
    ("asyncsplit_redelivered_rows_total", "", "rows that were not committed went to a replacement"),
    ("asyncsplit_guard_rejections_total", "operation", "calls were rejected by the guard"),
    ("asyncsplit_epochs_total", "outcome", "epochs ended"),
)
_AS_IT_SHOULD = {"completed", "stopped"}
"""Outcomes of an epoch that nobody needs to be warned of."""


def current(now: Present) -> Iterator[str]:
    """Yield what is wrong at the moment."""
    if now.missing_count and now.waits["barrier"] > BARRIER_S:
        yield f"the barrier waits for {now.missing_text}, for {age(now.waits['barrier'])}"
    for row in now.rows:
        silent_s = row.silent_s or 0.0
        if row.state == "dead":
            yield f"split {row.split}: its consumer has died and is not replaced"
        elif silent_s > SILENT_S and row.state != "missing":
            yield f"split {row.split}: silent for {age(silent_s)}, so stuck or in a long step"
    for wait, what in _WAITS.items():
        if now.waits[wait] > WAIT_S:
            yield f"the coordinator waits {what}, for {age(now.waits[wait])}"
    if now.waits["loop"] > LOOP_S:
        yield f"the coordinator's event loop is blocked, for {age(now.waits['loop'])}"


def new(before: Samples | None, after: Samples) -> Iterator[str]:
    """Yield what has happened since a scrape; without one, since the coordinator began."""
    for name, label, what in _COUNTED:
        earlier = {} if before is None else before.by(label, name)
        for key, count in after.by(label, name).items():
            more = count - earlier.get(key, 0.0)
            if more > 0 and key not in _AS_IT_SHOULD:
                yield f"{more:,.0f} {what}{f': {key}' if key else ''}"


def age(seconds: float) -> str:
    """Write a duration, in six characters at most up to 100 hours."""
    if seconds < 99.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m"
