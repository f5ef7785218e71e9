"""Where every row of an epoch is: unassigned, leased, committed or truncated.

A row that is repeated to make shares equal is a row of its own there, in a lease of its own.

Each split has a log of leases, numbered without gaps. A consumer reads it from a cursor and says
how far it has come; both are absolute, so a message that is lost, repeated or late does no harm,
and a replacement that reads from the committed position gets just what was not finished.
"""

import zlib
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from asyncsplit.core.readers import readers_of
from asyncsplit.core.routing import Part, RowsRouter
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.errors import StateMismatchError


class Past(NamedTuple):
    """How far a split of an earlier run had come in the epoch."""

    rows: int
    check: int
    """Fingerprint of the leases these rows are in."""


class Position(NamedTuple):
    """Where a consumer stands: the epoch it wants to read, and how much of it is finished."""

    epoch: int
    rows: int = 0
    """Rows of the split the training loop has finished with."""
    check: int = 0
    """Fingerprint of the leases these rows are in."""
    fed: int = 0
    """Number of the first lease it has not begun; it keeps what it has begun."""
    saved: bool = False
    """Whether it comes from a state saved by an earlier run."""
    shuffle: ShuffleKey | None = None
    """What the order of its rows is drawn from, if they are shuffled."""
    low: int = 0
    """Number of the first lease not wholly finished, if they are."""
    earlier: tuple[tuple[Past, ...], ...] = ()
    """What was read of the epoch by runs with another number of splits, one after the other: rows
    and leases are counted in what those left."""

    @property
    def has_begun(self) -> bool:
        """Whether anything of the epoch has been read."""
        return bool(self.rows or self.fed)

    def under(self, shuffle: ShuffleKey | None) -> "Position":
        """Return where to go on when rows are shuffled so from now on.

        In an order drawn otherwise nobody knows which rows are finished: then it is the first row.
        """
        if self.shuffle is None or (shuffle is not None and self.shuffle.is_like(shuffle)):
            return self
        return Position(self.epoch, saved=self.saved, earlier=self.earlier)


FINISHED = 2**62
"""More rows than any epoch has: the position of a split that has finished the epoch."""


def fingerprint(before: int, rows: int) -> int:
    """Add a lease of so many rows to the fingerprint of the leases before it."""
    return zlib.crc32(rows.to_bytes(8, "little"), before)


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


class Ledger:
    """All splits' logs of one epoch, filled by a router within each split's budget of bytes.

    Each replica of a split reads a log of its own, and all of them have the same leases: a block is
    let go of when the last one has finished with it, and the slowest one has the budget's say.
    """

    def __init__(
        self,
        n: int,
        router: RowsRouter,
        budget_bytes: int,
        resume: Mapping[int, Position] | None = None,
        replicas: int = 1,
    ) -> None:
        """Start an epoch: no rows yet, every reader present and hungry.

        ``resume`` says how far readers have already come; their rows up to there are committed as
        they are produced.
        """
        self.logs = [
            SplitLog(reader // replicas, (resume or {}).get(reader))
            for reader in range(n * replicas)
        ]
        """Of each reader; see `asyncsplit.core.readers`."""
        self.router = router
        self.produced_rows = 0
        self.finished = False
        self.leased_bytes = 0
        self.budget_bytes = budget_bytes
        """Bytes that may wait for each split, but for the last block."""
        self._closed = False
        self._replicas = replicas
        self._sharing = [self.logs[i * replicas : (i + 1) * replicas] for i in range(n)]
        self._split_bytes = [0] * n
        self._hungry = set(range(n))
        self._full: set[int] = set()

    @property
    def held_bytes(self) -> int:
        """Bytes of all rows that are unassigned or leased."""
        return self.router.unassigned_bytes + self.leased_bytes

    @property
    def committed_rows(self) -> list[int]:
        """For each split, the rows that all who read it have finished with."""
        return [
            min(present)
            if (present := [log.committed_rows for log in logs if not log.left])
            else max(log.committed_rows for log in logs)
            for logs in self._sharing
        ]

    @property
    def leased_rows(self) -> int:
        """Rows assigned to splits that are neither committed nor truncated."""
        truncated = self.truncated_rows - self.router.truncated_rows
        return sum(self.router.rows) - sum(self.committed_rows) - truncated

    @property
    def truncated_rows(self) -> int:
        """Rows nobody gets: what `equal` drops, and what was left for those who stopped early."""
        return self.router.truncated_rows + sum(
            min(log.truncated_rows for log in logs)
            for logs in self._sharing
            if all(log.left for log in logs)
        )

    def produce(self, parts: Iterable[Part]) -> None:
        """Take the next parts of the dataset."""
        for part in parts:
            self.produced_rows += part.rows
            self.router.add(part)

    def finish(self) -> None:
        """Note that the dataset has no more parts this epoch."""
        self.finished = True
        self.router.finish()

    def route(self) -> set[int]:
        """Lease what can be assigned now; return the readers that got something.

        Raises:
            StateMismatchError: If a position to resume from was not reached.
        """
        got = set()
        for split, part in self.router.assign(self._hungry, self._full):
            for reader, log in enumerate(self._sharing[split], split * self._replicas):
                if log.append(part):
                    got.add(reader)
            self._sort(split)
        if self.complete and not self._closed:
            self._closed = True
            for log in self.logs:
                log.finish()
        return got

    def acknowledge(self, reader: int, rows: int, *, fed: int, low: int | None = None) -> None:
        """Commit rows of a reader; see `SplitLog.acknowledge`."""
        self.logs[reader].acknowledge(rows, fed=fed, low=low)
        self._sort(reader // self._replicas)

    def leave(self, reader: int) -> None:
        """Note that a reader's consumer takes no more this epoch; see `SplitLog.leave`."""
        split = reader // self._replicas
        self.logs[reader].leave()
        if all(log.left for log in self._sharing[split]):
            self.router.leave(split)
        self._sort(split)

    def rewind(self, reader: int, shuffle: ShuffleKey | None = None) -> None:
        """Let a new consumer take a reader's place; see `SplitLog.rewind`."""
        self.logs[reader].rewind(shuffle)
        self._sort(reader // self._replicas)

    def blockers(self) -> Collection[int]:
        """Name the readers whose full budgets keep blocks from all others."""
        if self.complete or self.credit():
            return ()
        # On demand nobody is wanted where each split has a replica that has enough.
        wanted = self.router.wanted_by(self._hungry) or range(len(self._sharing))
        return [
            reader
            for split in wanted
            for reader in readers_of(split, self._replicas)
            if self.logs[reader].waiting_bytes >= self.budget_bytes
        ]

    def exhausted(self, reader: int) -> bool:
        """Tell whether nothing will be added to the reader's log any more."""
        return self.logs[reader].left or not self.router.may_get_more(reader // self._replicas)

    @property
    def complete(self) -> bool:
        """Whether every row of the epoch is leased, committed or truncated."""
        return self.router.complete

    def credit(self) -> int:
        """Return how many bytes may be taken from the dataset; 1 stands for one block.

        Bytes waiting for a split exceed its budget by less than one block, whichever split each
        block turns out to be for.
        """
        present = [log.waiting_bytes for log in self.logs if not log.left]
        if self.finished or not present:
            return 0
        if self._full.issuperset(self.router.wanted_by(self._hungry)):
            return 0
        return max(1, self.budget_bytes - max(present))

    def _sort(self, split: int) -> None:
        """Keep what is leased, which splits could use a part at once, and which have enough."""
        leased = waiting = 0
        starving = False
        for log in self._sharing[split]:
            # Whoever is behind holds all that the others hold.
            if log.leased_bytes > leased:
                leased = log.leased_bytes
            if log.waiting_bytes > waiting:
                waiting = log.waiting_bytes
            if not (log.left or log.waiting):
                starving = True
        self.leased_bytes += leased - self._split_bytes[split]
        self._split_bytes[split] = leased
        full = waiting >= self.budget_bytes
        (self._full.add if full else self._full.discard)(split)
        (self._hungry.add if starving and not full else self._hungry.discard)(split)
