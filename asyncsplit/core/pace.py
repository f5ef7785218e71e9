"""How fast a split's consumer is, and when it needs more: what is given on demand depends on it.

Times are seconds of any clock that only moves forward. Nothing here reads one.
"""

from collections import deque
from math import inf
from statistics import median_low

HORIZON_S = 0.1
"""Work for how long a consumer is given at once, if that is more than a block: each message costs
about a millisecond of both processes, whatever it brings."""

SLACK_S = 0.02
SLACK_SHARE = 0.2
"""How long before a consumer runs out it is given more, at least, and as a share of the time that
takes it: enough for the answer's way and for fetching the block."""

SAMPLES = 3
"""How many of its last messages say how fast a consumer is. Of these the median counts, so that a
single pause, as for a validation, says nothing."""

PATIENCE = 2
"""For how long at most a consumer has nothing and is given nothing, because others would be done
sooner with all there is: as a multiple of the time a block takes it."""

LOOKS = 4
"""How often it is seen in such a time whether that still holds."""


def rows_ahead(buffered: int, batch_size: int) -> int:
    """Return how many of the rows there are make whole batches; below 0, how many one lacks."""
    return buffered // batch_size * batch_size if buffered >= batch_size else buffered - batch_size


class Pace:
    """What is known of the consumer, or the replicas, of one split in an epoch.

    They say how many rows they have ahead and what their loops have done so far; how long what
    they are given will last is estimated from that. Who has finished with nothing yet gets one
    block at a time, at once.
    """

    __slots__ = (
        *("_asked", "_missing", "_samples", "_totals"),
        *("free_at", "look_at", "refused_at", "row_s"),
    )

    def __init__(self, earlier: "Pace | None" = None) -> None:
        """Start an epoch, with the pace of an earlier one if there was any."""
        self.free_at = -inf
        """When it will have used up what it has been given."""
        self.row_s: float | None = earlier.row_s if earlier else None
        """Seconds it takes for a row, waits for data left out; None if not known."""
        self.look_at = -inf
        """Before this it is given nothing."""
        self.refused_at: float | None = None
        """Since when it has nothing, because the next block is left to others."""
        self._asked = False
        self._missing = 0
        self._samples: deque[float] = deque(earlier._samples if earlier else (), maxlen=SAMPLES)
        self._totals: dict[int, tuple[int, float]] = {}

    @property
    def rows_per_s(self) -> float:
        """Rows it can do in a second, as far as known."""
        return 1 / self.row_s if self.row_s else 0.0

    def ask(self, reader: int, rows_ahead: int, rows: int, busy_s: float, now: float) -> None:
        """Note that a reader can do with more.

        ``rows_ahead`` are the rows it has for whole batches; below 0, how many the next batch
        lacks. In ``busy_s`` seconds its loop has finished with ``rows`` rows so far. Of several
        messages since a block was given, the one counts that is most in need.
        """
        rows_before, busy_before = self._totals.get(reader, (rows, busy_s))
        if rows > rows_before:
            self._samples.append(max(1e-9, (busy_s - busy_before) / (rows - rows_before)))
            self.row_s = median_low(self._samples)
        if rows != rows_before or reader not in self._totals:
            self._totals[reader] = rows, busy_s
        free_at = now + max(0, rows_ahead) * (self.row_s or 0.0)
        missing = max(0, -rows_ahead)
        self.free_at = min(self.free_at, free_at) if self._asked else free_at
        self._missing = max(self._missing, missing) if self._asked else missing
        self._asked = True
        self.look_at = -inf

    def take(self, rows: int, now: float) -> None:
        """Note that it is given so many rows."""
        self.free_at = max(self.free_at, now) + rows * (self.row_s or 0.0)
        self._missing = max(0, self._missing - rows)
        self._asked = False
        self.look_at = -inf
        self.refused_at = None

    def due_at(self, rows: int) -> float:
        """Return when to give it a block of so many rows, so that it need not wait for that."""
        return self.free_at - max(SLACK_S, SLACK_SHARE * rows * (self.row_s or 0.0))

    def lasts_for(self, now: float) -> float:
        """Return for how long it has enough: not at all, if the next batch lacks rows."""
        return 0.0 if self._missing else self.free_at - now

    def free_in(self, now: float) -> float:
        """Return in how long it will be free; if it should be and has not asked, nobody knows.

        Then as long again as it is late: so sooner or later nobody counts on it any more.
        """
        free_in = self.free_at - now
        return max(0.0, free_in) if self._asked else abs(free_in)


class Paces:
    """The paces of all splits, and what follows for each of them from those of the others.

    A split that is about to run out is given a block, and more if that does not last for
    `HORIZON_S`; but no more than what takes all splits together half as long as the rest: guided
    self-scheduling, Polychronopoulos and Kuck 1987. Of the last blocks it gets none if all others
    would be through with all that is left before it was with that one.
    """

    def __init__(self, n: int, earlier: "Paces | None" = None) -> None:
        """Start an epoch, with the paces of an earlier one if there was any."""
        self._of: list[Pace] = [Pace(earlier._of[split] if earlier else None) for split in range(n)]
        self._left: set[int] = set()
        self._rows_per_s = sum(pace.rows_per_s for pace in self._of)

    def ask(
        self, split: int, reader: int, rows_ahead: int, rows: int, busy_s: float, now: float
    ) -> None:
        """Note that a reader of the split can do with more; see `Pace.ask`."""
        pace = self._of[split]
        before = pace.rows_per_s
        pace.ask(reader, rows_ahead, rows, busy_s, now)
        if split not in self._left:
            self._rows_per_s += pace.rows_per_s - before

    def take(self, split: int, rows: int, now: float) -> None:
        """Note that the split is given so many rows."""
        self._of[split].take(rows, now)

    def leave(self, split: int) -> None:
        """Note that the split takes nothing more."""
        if split not in self._left:
            self._left.add(split)
            self._rows_per_s -= self._of[split].rows_per_s
        for pace in self._of:
            pace.look_at = -inf

    def look_at(self, split: int) -> float:
        """Return when `is_due` may say so, if it has not and nothing happens before."""
        return self._of[split].look_at

    def is_due(self, split: int, rows: int, rest: int, now: float, *, is_all: bool = False) -> bool:
        """Tell whether to give a split a block of so many rows now.

        ``rest`` are the rows that nobody has been given yet; ``is_all`` says that no more come.
        """
        pace = self._of[split]
        if now < pace.look_at:
            return False
        if pace.row_s is None:
            return True
        if now < (due_at := pace.due_at(rows)):
            pace.look_at = due_at
            return False
        takes_s = rows * pace.row_s
        if not is_all or not self._others_are_sooner(split, rows, rest, takes_s, now):
            return True
        if pace.refused_at is None:
            pace.refused_at = max(now, pace.free_at)
        pace.look_at = min(pace.refused_at + PATIENCE * takes_s, now + takes_s / LOOKS)
        return pace.look_at <= now

    def wants_more(self, split: int, rest: int, now: float) -> bool:
        """Tell whether to give the split a further block at once."""
        pace = self._of[split]
        if pace.row_s is None or self._rows_per_s <= 0:
            return False
        return pace.lasts_for(now) < min(HORIZON_S, rest / self._rows_per_s / 2)

    def _others_are_sooner(
        self, split: int, rows: int, rest: int, takes_s: float, now: float
    ) -> bool:
        """Tell whether all others would be through with the rest before the split with a block.

        As if rows could be shared out exactly; that blocks cannot makes a difference of one.
        """
        takes_s += max(0.0, self._of[split].free_at - now)
        if self._rows_per_s <= 0 or rest / self._rows_per_s >= takes_s:
            return False  # all together would not be: most of the time this is enough to know
        others = [
            (pace.row_s, min(pace.free_in(now), takes_s))
            for other, pace in enumerate(self._of)
            if other != split and other not in self._left and pace.row_s is not None
        ]
        if not others:
            return False
        rows_per_s = sum(1 / row_s for row_s, _ in others)
        work: float = rest + sum(free_in / row_s for row_s, free_in in others)
        return work / rows_per_s + rows * min(others)[0] < takes_s
