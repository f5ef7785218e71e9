"""What one split's consumer has been given of an epoch, lease by lease.

Each split has a log of leases, numbered without gaps. A consumer reads it from a cursor and says
how far it has come; both are absolute, so a message that is lost, repeated or late does no harm,
and a replacement that reads from the committed position gets just what was not finished.
"""

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from asyncsplit.core.position import FINISHED, Position, fingerprint
from asyncsplit.core.routing import Part
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.errors import StateMismatchError


class Lease(NamedTuple):
    """Number ``seq`` of a split's log: a part of a block and where its rows lie in the split."""

    seq: int
    part: Part
    first_row: int

    @property
    def end_row(self) -> int:
        """Row of the split at which the next lease begins."""
        return self.first_row + self.part.rows


class SplitLog:
    """One split's leases, oldest first, from the first that is not wholly committed."""

    def __init__(self, split: int = 0, resume: Position | None = None) -> None:
        """Start an empty log; rows finished before ``resume`` will count as committed."""
        self.check = 0
        """Fingerprint of the leases no longer held."""
        self.skipped: list[int] = []
        """Rows of each of these."""
        self._split = split
        self._resume = resume or Position(0)
        self.shuffle = self._resume.shuffle
        """What its order is drawn from, if the split was shuffled from its first row on."""
        self._verified = self._resume.rows in (0, FINISHED)
        self.assigned_rows = 0
        self.committed_rows = 0
        self.truncated_rows = 0
        self.leased_bytes = 0
        self.waiting_bytes = 0
        self.next_seq = 0
        self.left = False
        self._fed = 0
        self._shuffled = False
        self._leases: deque[Lease] = deque()

    @property
    def first_seq(self) -> int:
        """Number of the oldest lease still held."""
        return self.next_seq - len(self._leases)

    @property
    def leased_rows(self) -> int:
        """Rows assigned to this split that are neither committed nor truncated."""
        return self.assigned_rows - self.committed_rows - self.truncated_rows

    @property
    def waiting(self) -> int:
        """How many leases the consumer has not yet begun to cut into batches."""
        return self.next_seq - self._fed

    def append(self, part: Part) -> bool:
        """Lease a part to this split; False (and the part truncated) if its consumer has left."""
        if self.left:
            self.assigned_rows += part.rows
            self.truncated_rows += part.rows
            return False
        lease = Lease(self.next_seq, part, self.assigned_rows)
        if self._resume.shuffle is not None:
            finished, inside = lease.seq < self._resume.low, False
        else:
            finished = lease.end_row <= self._resume.rows
            inside = lease.first_row < self._resume.rows
        if not finished:
            self._verify(fingerprint(self.check, part.rows) if inside else self.check)
        self.next_seq += 1
        self.assigned_rows += part.rows
        self.committed_rows = max(self.committed_rows, min(self._resume.rows, self.assigned_rows))
        if finished:
            self._skip(part)
            self._fed = self.next_seq
            return False
        self._leases.append(lease)
        self.leased_bytes += part.size_bytes
        if lease.seq < self._resume.fed:
            self._fed = self.next_seq
        else:
            self.waiting_bytes += part.size_bytes
        return True

    def finish(self) -> None:
        """Note that no more parts come.

        Raises:
            StateMismatchError: If the position to resume from was not reached.
        """
        reached = self.assigned_rows >= self._resume.rows and self.next_seq >= self._resume.low
        self._verify(self.check if reached else None)

    def _verify(self, check: int | None) -> None:
        """Compare what was skipped with what the position to resume from says."""
        if self._verified:
            return
        self._verified = True
        if check != self._resume.check:
            raise StateMismatchError(
                f"split {self._split} cannot go on after row {self._resume.rows} of epoch"
                f" {self._resume.epoch}: the dataset's blocks are not those that were read before."
                " Use the same dataset, of the same blocks in the same order"
            )

    def read(self, cursor: int, *, max_leases: int) -> Sequence[Lease]:
        """Return leases from number ``cursor`` on; reading changes nothing.

        Raises:
            ValueError: If that lease is already committed and gone, or was never made.
        """
        if not self.first_seq <= cursor <= self.next_seq:
            raise ValueError(
                f"cursor {cursor} is outside the leases held, {self.first_seq} to {self.next_seq}"
            )
        begin = cursor - self.first_seq
        return tuple(islice(self._leases, begin, begin + max_leases))

    def acknowledge(self, rows: int, *, fed: int, low: int | None = None) -> None:
        """Commit the first ``rows`` rows, those the training loop has finished with.

        ``fed`` is the number of the first lease not yet begun; ``low`` that of the first lease
        not wholly finished, for consumers that shuffle (in order it follows from ``rows``).
        Going backwards is no error: an old message, it has no effect.

        Raises:
            ValueError: If more is acknowledged than was leased.
        """
        deliverable = self.assigned_rows - self.truncated_rows
        # A consumer that resumes is ahead of the log until all it has had is produced again.
        ahead = self.assigned_rows < self._resume.rows or self.next_seq < self._resume.fed
        if not ahead and (rows > deliverable or fed > self.next_seq):
            raise ValueError(
                f"acknowledged {rows} rows and {fed} leases,"
                f" but only {deliverable} and {self.next_seq} exist"
            )
        self.committed_rows = max(self.committed_rows, min(rows, deliverable))
        self._shuffled = low is not None
        while self._fed < min(fed, self.next_seq):
            self.waiting_bytes -= self._at(self._fed).part.size_bytes
            self._fed += 1
        while self._fed > self.first_seq and self._finished(self._leases[0], low):
            part = self._leases.popleft().part
            self.leased_bytes -= part.size_bytes
            self._skip(part)

    def leave(self) -> None:
        """Truncate what is leased and all that comes: the consumer takes no more."""
        self.left = True
        self._verified = True  # nobody goes on here any more
        self.truncated_rows += self.leased_rows
        self.leased_bytes = self.waiting_bytes = 0
        self._fed = self.next_seq
        self._leases.clear()

    @property
    def skip_rows(self) -> int:
        """How many rows of the oldest lease held are committed and to be left out."""
        return 0 if self.shuffle else self.committed_rows - self._first_row

    @property
    def position(self) -> Position:
        """Where a new consumer begins, also while what was finished is produced again."""
        here = self._resume._replace(fed=0, saved=False)
        if self.assigned_rows < here.rows or self.next_seq < here.low:
            return here
        here = Position(here.epoch, self.committed_rows, self.check, earlier=here.earlier)
        if self.shuffle is not None:
            return here._replace(shuffle=self.shuffle, low=self.first_seq)
        if self._shuffled:
            # Which rows are finished is no number: all of them are before the oldest lease.
            return here._replace(rows=self._first_row)
        if self._first_row < self.committed_rows:
            return here._replace(check=fingerprint(self.check, self._leases[0].part.rows))
        return here

    def rewind(self, shuffle: ShuffleKey | None = None) -> None:
        """Let a new consumer begin at the first row that is not committed.

        If it shuffles as the one before did, it can draw the same order and go on in it. Else,
        after one that shuffled, it begins at the oldest lease held, with committed rows in it:
        which those are is known only in that order. What of the leases before is still to be
        produced again comes again, too.
        """
        self.forget_begun()
        if self.shuffle is None or shuffle is None or not self.shuffle.is_like(shuffle):
            if self._shuffled or self._resume.shuffle is not None:
                self.committed_rows = self._first_row
                self._resume = Position(self._resume.epoch, earlier=self._resume.earlier)
                self._verified = True
            self._shuffled = False
            self.shuffle = None if self.committed_rows or self._resume.rows else shuffle

    def forget_begun(self) -> None:
        """Note that whoever reads the split now has begun nothing of it.

        Nor has it begun what the one before had, where that is still being produced again.
        """
        self._fed = self.first_seq
        self.waiting_bytes = self.leased_bytes
        self._resume = self._resume._replace(fed=0)

    @property
    def _first_row(self) -> int:
        """Row of the split at which the oldest lease held begins."""
        return self._leases[0].first_row if self._leases else self.assigned_rows

    def _skip(self, part: Part) -> None:
        self.check = fingerprint(self.check, part.rows)
        self.skipped.append(part.rows)

    def _at(self, seq: int) -> Lease:
        return self._leases[seq - self.first_seq]

    def _finished(self, lease: Lease, low: int | None) -> bool:
        return lease.end_row <= self.committed_rows if low is None else lease.seq < low
