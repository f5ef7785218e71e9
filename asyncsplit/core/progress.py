"""How far a stream has come in its split, in slices begun and rows finished with."""

from collections import deque
from typing import NamedTuple

from asyncsplit.core.position import Position, fingerprint
from asyncsplit.core.shuffle import ShuffleKey


class Progress(NamedTuple):
    """How far a consumer has come in an epoch; what the next message acknowledges.

    ``rows``: rows the training loop has finished with. ``fed``: number of the first slice not
    yet begun. ``low``: number of the first slice not finished, if it does not follow from
    ``rows`` because rows are shuffled.
    """

    rows: int = 0
    fed: int = 0
    low: int | None = None


class Reading:
    """One stream's account of its slices.

    Call `start`, then `deliver`, then `begin` for each slice. `progress` and `position` may be
    asked for at any time, and for no fewer finished rows than before. They take the rows of this
    stream that the training loop has finished with, and of a shuffle also which slice it began,
    counted from 0, has the oldest unfinished row.
    """

    def __init__(self, arrived: Position | None = None) -> None:
        """Start with nothing delivered, where the consumer stood when it arrived."""
        self.fed = 0
        """Number of the first slice not begun."""
        self._arrived = arrived or Position(0)
        self._began: Position | None = None
        self._rows_before = 0
        self._draws_all = True
        self._first: int | None = None
        self._skip_rows = 0
        self._check = 0
        self._arrived_check = 0
        self._next_row = 0
        # Of each slice begun and not known to be finished: its first row, and the fingerprint
        # after it.
        self._marks: deque[tuple[int, int]] = deque()
        self._unmarked = 0

    def start(self, position: Position) -> None:
        """Note the epoch, and what of it was finished before."""
        self._began = position
        self._rows_before = position.rows
        # Whether all of the split's rows are in one shuffled order, from the first on.
        self._draws_all = position.rows == 0 or position.shuffle is not None

    def deliver(self, cursor: int, skip_rows: int, check: int, rows: int = 0) -> None:
        """Note the first slice: its number, its finished rows, the fingerprint before it, its rows.

        The last may be left out if none of it is finished.
        """
        self._first = self.fed = cursor
        self._skip_rows = skip_rows
        self._check = check
        self._arrived_check = fingerprint(check, rows) if skip_rows else check
        self._next_row = self._rows_before - skip_rows

    def begin(self, rows: int) -> int:
        """Begin the next slice, of so many rows; return how many at its start to leave out."""
        self.fed += 1
        last = self._marks[-1][1] if self._marks else self._check
        self._marks.append((self._next_row, fingerprint(last, rows)))
        self._next_row += rows
        skipped = min(self._skip_rows, rows)
        self._skip_rows -= skipped
        return skipped

    @property
    def begun(self) -> int:
        """How many slices were begun."""
        return self.fed - (self._first or 0)

    def progress(self, finished_rows: int, oldest: int | None) -> Progress:
        """Return what to acknowledge."""
        rows = finished_rows + self._rows_before
        if oldest is None:
            while len(self._marks) > 1 and self._marks[1][0] <= rows:
                self._check = self._marks.popleft()[1]
            return Progress(rows, self.fed)
        while self._unmarked < oldest:
            self._check = self._marks.popleft()[1]
            self._unmarked += 1
        return Progress(rows, self.fed, (self._first or 0) + oldest)

    def position(
        self, finished_rows: int, oldest: int | None, shuffle: ShuffleKey | None
    ) -> Position:
        """Return where another stream is to go on; ``shuffle`` is what the order is drawn from."""
        if self._began is None:
            return self._arrived
        if self._first is None:
            return self._began  # nothing has been delivered
        epoch, earlier = self._began.epoch, self._began.earlier
        rows, fed, low = self.progress(finished_rows, oldest)
        if low is not None:
            if self._draws_all:
                return Position(
                    epoch, rows, self._check, fed, shuffle=shuffle, low=low, earlier=earlier
                )
            # Which rows are finished is no number: go back to where all of them are.
            rows = self._marks[0][0] if self._marks else rows
        check = self._check if self.begun else self._arrived_check
        for first_row, check_after in self._marks:
            if first_row >= rows:
                break
            check = check_after
        return Position(epoch, rows, check, fed, earlier=earlier)
