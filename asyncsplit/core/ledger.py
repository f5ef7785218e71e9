"""Where every row of an epoch is: unassigned, leased, committed or truncated.

A row that is repeated to make shares equal is a row of its own there, in a lease of its own.
"""

from collections.abc import Collection, Iterable, Mapping

from asyncsplit.core.leases import SplitLog
from asyncsplit.core.position import Position
from asyncsplit.core.readers import readers_of
from asyncsplit.core.routing import Part, RowsRouter
from asyncsplit.core.shuffle import ShuffleKey


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

    def ask(self, reader: int, rows_ahead: int, rows: int, busy_s: float, now: float) -> None:
        """Note what a reader has ahead, and how fast it is; see `Pace.ask`."""
        self.router.ask(reader // self._replicas, reader, rows_ahead, rows, busy_s, now)

    def held_until(self, reader: int) -> float:
        """Return until when a reader is given nothing because it needs nothing."""
        return self.router.held_until(reader // self._replicas)

    @property
    def route_at(self) -> float | None:
        """When to route again though nothing has happened, if at all."""
        return self.router.route_at(self._hungry)

    def route(self, now: float = 0.0) -> set[int]:
        """Lease what can be assigned now; return the readers that got something.

        Raises:
            StateMismatchError: If a position to resume from was not reached.
        """
        got = set()
        for split, part in self.router.assign(self._hungry, self._full, now):
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
        return self.router.credit(self.budget_bytes - max(present), self._hungry, self._full)

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
