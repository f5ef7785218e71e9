"""What must hold after every step, seen from outside of the coordinator and of the consumers."""

from collections import Counter
from dataclasses import dataclass, field

from asyncsplit.coordinator import SplitCoordinator
from asyncsplit.core.epochs import Phase, Stream
from asyncsplit.core.ledger import Ledger
from asyncsplit.core.routing import Equal
from tests.simulation.dataset import FakeDataset, PumpThread, Ref


@dataclass
class Share:
    """What one split got in one epoch."""

    ids: list[int] = field(default_factory=list)
    padded: int = 0
    """How many of them repeat others: the last."""
    seen: int = 0
    """Leases looked at."""
    drawn: list[int] = field(default_factory=list)
    """The order its loops have had them in, if it is shuffled."""
    committed: int = 0
    finished: int = 0
    """Rows the furthest of its loops has finished with."""
    bound_bytes: int = 0
    """What may wait where a replacement has begun anew with all that was not finished."""


@dataclass
class Oracle:
    """Watches one coordinator."""

    coordinator: SplitCoordinator
    dataset: FakeDataset
    budget: int
    equal: Equal
    shuffled: bool
    may_drop: int
    """Rows of a last batch that may count as finished though nobody gets them."""
    shares: dict[tuple[int, int], Share] = field(default_factory=dict)
    unaware: set[Stream] = field(default_factory=set)
    """Streams closed before they knew that their epoch had begun."""
    redelivered: int = 0
    steps: int = 0
    taken_over: int = 0
    _ledger: Ledger | None = None
    _epoch: int = -1
    _ran: bool = False
    replicas: int = 1
    _leased: set[tuple[int, int]] = field(default_factory=set)
    _holders: dict[int, Stream] = field(default_factory=dict)

    def step(self) -> None:
        """Look at the coordinator; between two steps of its loop everything must hold."""
        self.steps += 1
        now = self.coordinator._runner.distribution.ledger
        epochs = self.coordinator._runner.epochs
        if now is not self._ledger:
            if self._ran:
                assert self._ledger is not None
                self._check_ledger(self._ledger)
                self._check_end(self._ledger)
            self._ran = False
            self._ledger = now
            self._leased = set()
            self._holders = {}
            assert epochs.epoch in (self._epoch, self._epoch + 1), "epochs only grow, by one"
            self._epoch = epochs.epoch
        if epochs.phase is Phase.RUNNING:
            assert epochs.epoch == self._epoch
            self._ran = True
            pump = self.coordinator._runner.distribution._pump
            assert pump is not None
            assert isinstance(pump._thread, PumpThread)
            assert pump._thread.execution.epoch == epochs.epoch, "an epoch runs on its own"
            for split, stream in epochs.active.items():
                if self._holders.setdefault(split, stream) != stream:
                    self._note_take_over(split, stream)
            self._check_ledger(now)

    def share(self, epoch: int, split: int) -> Share:
        """Return what a split got in an epoch so far."""
        return self.shares.setdefault((epoch, split), Share())

    def begins(self, epoch: int, split: int, stream: Stream, rows: int) -> None:
        """Note that a loop gets its first batch, which begins at this row of the share."""
        share = self.share(epoch, split)
        if self._epoch == epoch and self.coordinator._runner.epochs.active.get(split) == stream:
            assert rows >= share.committed, f"row {rows} of {split=} is committed, and comes again"
        assert rows <= share.finished, f"rows {share.finished} to {rows} of {split=} are lost"
        self.redelivered += share.finished - rows

    def delivered(self, epoch: int, split: int, first: int, ids: list[int]) -> None:
        """Check a batch: the next rows of the share, or other rows of it."""
        share = self.share(epoch, split)
        if self.shuffled:
            assert set(ids) <= set(share.ids)
            before = share.drawn[first : first + len(ids)]
            assert before == ids[: len(before)], f"{split=} got {ids}, and before {before}"
            share.drawn += ids[len(before) :]
            assert not Counter(share.drawn) - Counter(share.ids), "a row came twice"
        else:
            expected = share.ids[first : first + len(ids)]
            assert ids == expected, f"{split=} got {ids}, not {expected}"

        first_reader = split - split % self.replicas
        for reader in range(first_reader, first_reader + self.replicas):
            fellow = self.share(epoch, reader)
            pairs = zip(share.drawn, fellow.drawn, strict=False)
            pairs = pairs if self.shuffled else zip(share.ids, fellow.ids, strict=False)
            assert all(mine == theirs for mine, theirs in pairs), "replicas see the same"

    def finished(self, epoch: int, split: int, rows: int) -> None:
        """Note that a loop has finished with so many rows of its share."""
        share = self.share(epoch, split)
        share.finished = max(share.finished, rows)

    def ended(self, epoch: int, split: int, rows: int) -> None:
        """Check that a loop that ended has had its whole share."""
        share = self.share(epoch, split)
        assert rows == len(share.ids), f"{split=} ended after {rows} of {len(share.ids)} rows"

    def _check_ledger(self, ledger: Ledger) -> None:
        for split, log in enumerate(ledger.logs):
            share = self.share(self._epoch, split)
            if share.seen < log.next_seq:
                self._see(ledger, split, share)
            assert log.leased_rows >= 0
            assert log.committed_rows >= share.committed, "a committed row is not any more"
            share.committed = log.committed_rows
            may_drop = self.may_drop if ledger.finished else 0
            assert log.committed_rows <= share.finished + may_drop, (
                f"{log.committed_rows} rows of {split=} are committed,"
                f" but only {share.finished} finished"
            )
            bound = self.budget + self.dataset.largest_bundle_bytes
            if log.waiting_bytes <= bound:
                share.bound_bytes = 0
            assert log.waiting_bytes <= max(bound, share.bound_bytes), (
                f"{log.waiting_bytes} bytes wait for {split=}, {bound} may"
            )
        in_a_place = ledger.leased_rows + ledger.truncated_rows + ledger.router.unassigned_rows
        assert sum(ledger.committed_rows) + in_a_place == (
            ledger.produced_rows + ledger.router.padded_rows
        ), "each row is unassigned, leased, committed or truncated"
        assert ledger.leased_rows >= 0
        held: list[dict[int, int]] = [{} for _ in ledger.router.rows]
        for reader, log in enumerate(ledger.logs):
            for lease in log.read(log.first_seq, max_leases=10_000):
                held[reader // self.replicas][id(lease.part)] = lease.part.size_bytes
        assert sum(sum(sizes.values()) for sizes in held) == ledger.leased_bytes

    def _see(self, ledger: Ledger, split: int, share: Share) -> None:
        log = ledger.logs[split]
        if log.left:
            return  # its leases are gone
        assert share.seen >= log.first_seq, "a lease was committed before anybody saw it"
        for lease in log.read(share.seen, max_leases=log.next_seq):
            assert lease.seq == share.seen, "sequence numbers have no gaps"
            assert lease.first_row == len(share.ids)
            assert isinstance(lease.part.block, Ref)
            ids = lease.part.block.ids[lease.part.start : lease.part.stop]
            if lease.part.padding:
                share.padded += len(ids)
            else:
                assert not share.padded, "padding comes last"
                again = {(split % self.replicas, i) for i in ids}
                assert self._leased.isdisjoint(again), f"{ids} were leased before"
                self._leased.update(again)
            share.ids.extend(ids)
            share.seen += 1

    def _check_end(self, ledger: Ledger) -> None:
        if not ledger.complete:
            return
        assert ledger.produced_rows == self.dataset.rows
        n = len(ledger.logs) // self.replicas
        rows = ledger.router.rows
        padded = ledger.router.padded_rows
        if self.equal == "pad":
            assert rows == [-(-self.dataset.rows // n)] * n
            assert padded < n
        elif self.equal:
            assert rows == [self.dataset.rows // n] * n
        assert sum(rows) + ledger.router.truncated_rows - padded == self.dataset.rows
        for split, log in enumerate(ledger.logs):
            assert not log.left or self._holders.get(split) not in self.unaware, (
                f"{split=} has lost its share of epoch {self._epoch}, and was not told"
            )
        stayed = [split for split, log in enumerate(ledger.logs) if not log.left]
        for split in stayed:
            assert len(self.share(self._epoch, split).ids) == rows[split // self.replicas]

    def _note_take_over(self, split: int, stream: Stream) -> None:
        self._holders[split] = stream
        self.taken_over += 1
        share = self.share(self._epoch, split)
        # A bundle may be on its way that was allowed before.
        leased = self.coordinator._runner.distribution.ledger.logs[split].leased_bytes
        share.bound_bytes = leased + self.dataset.largest_bundle_bytes
