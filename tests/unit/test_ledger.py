"""Where rows are, and what may be taken from the dataset."""

from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncsplit.core.leases import SplitLog
from asyncsplit.core.ledger import Ledger
from asyncsplit.core.position import FINISHED, Position, fingerprint
from asyncsplit.core.routing import Equal, Part, make_router
from asyncsplit.core.shuffle import ShuffleKey

BUDGET = 400
SHARES = (1.0, 0.6, 0.3, 0.0)


def part(rows: int, block: object = None) -> Part:
    return Part(block, 0, rows, rows * 8)


def log_of(*rows: int) -> SplitLog:
    log = SplitLog()
    for count in rows:
        assert log.append(part(count))
    return log


def test_reading_is_repeatable_and_has_no_gaps() -> None:
    log = log_of(3, 4, 5)
    assert [lease.seq for lease in log.read(0, max_leases=10)] == [0, 1, 2]
    assert log.read(1, max_leases=1) == log.read(1, max_leases=1)
    assert log.read(3, max_leases=10) == ()


def test_a_cursor_outside_the_log_is_refused() -> None:
    log = log_of(3, 4)
    log.acknowledge(3, fed=1)
    with pytest.raises(ValueError, match="cursor 0 is outside the leases held, 1 to 2"):
        log.read(0, max_leases=1)
    with pytest.raises(ValueError, match="cursor 3"):
        log.read(3, max_leases=1)


def test_acknowledging_commits_rows_and_frees_whole_parts() -> None:
    log = log_of(3, 4)
    log.acknowledge(5, fed=2)
    assert (log.committed_rows, log.leased_rows, log.first_seq) == (5, 2, 1)
    assert (log.leased_bytes, log.waiting_bytes, log.waiting) == (32, 0, 0)
    log.acknowledge(2, fed=1)
    assert log.committed_rows == 5, "an old message takes nothing back"


def test_acknowledging_what_was_never_leased_is_refused() -> None:
    log = log_of(3)
    with pytest.raises(ValueError, match="acknowledged 4 rows"):
        log.acknowledge(4, fed=1)


def test_a_shuffling_consumer_says_itself_what_is_finished() -> None:
    log = log_of(3, 4, 5)
    log.acknowledge(7, fed=3, low=0)
    assert (log.committed_rows, log.first_seq) == (7, 0)
    log.acknowledge(9, fed=3, low=2)
    assert log.first_seq == 2


def test_a_new_consumer_begins_at_what_is_not_committed() -> None:
    log = log_of(3, 4, 5)
    log.acknowledge(5, fed=3)
    log.rewind()
    assert (log.first_seq, log.skip_rows) == (1, 2)
    assert log.waiting == 2
    assert log.waiting_bytes == log.leased_bytes == 9 * 8


def test_leaving_truncates_what_is_leased_and_what_comes() -> None:
    log = log_of(3, 4)
    log.acknowledge(2, fed=1)
    log.leave()
    assert not log.append(part(6))
    assert (log.committed_rows, log.leased_rows, log.truncated_rows) == (2, 0, 11)
    assert log.leased_bytes == log.waiting_bytes == 0


def test_who_leaves_before_its_rows_are_produced_again_is_no_mismatch() -> None:
    log = SplitLog(0, Position(0, rows=3, check=fingerprint(0, 3), fed=1))
    log.leave()
    log.append(part(3))
    log.finish()
    assert log.truncated_rows == 3


def test_a_block_larger_than_the_budget_gets_through() -> None:
    ledger = Ledger(1, make_router(1, equal=False, routing="rows"), budget_bytes=1)
    assert ledger.credit() > 0
    ledger.produce([part(1000)])
    assert ledger.route() == {0}
    assert ledger.credit() == 0
    ledger.acknowledge(0, 0, fed=1)
    assert ledger.credit() > 0, "a block being cut into batches does not wait any more"


def test_rows_of_a_split_that_left_do_not_stop_the_others() -> None:
    ledger = Ledger(2, make_router(2, equal=False, routing="rows"), BUDGET)
    ledger.leave(0)
    for _ in range(20):
        assert ledger.credit() > 0
        ledger.produce([part(10)])
        ledger.route()
        if ledger.logs[1].waiting:
            ledger.acknowledge(1, ledger.logs[1].assigned_rows, fed=ledger.logs[1].next_seq)
    assert ledger.logs[0].truncated_rows == 100
    assert ledger.logs[1].committed_rows == 100
    ledger.leave(1)
    assert ledger.credit() == 0


@pytest.mark.parametrize("produced", range(4))
def test_who_shuffles_otherwise_begins_before_all_unfinished_rows_also_after_a_restart(
    produced: int,
) -> None:
    """However much of what was finished had been produced again when it came."""
    before, other = ShuffleKey(20, 5, 1), ShuffleKey(40, 5, 1)
    log = SplitLog(0, Position(3, 10, fingerprint(0, 5), 3, shuffle=before, low=1))
    parts = [Part(object(), 0, 5, 10) for _ in range(5)]
    for part in parts[:produced]:
        log.append(part)
    log.rewind(other)
    began = log.position
    for part in parts[produced:]:
        log.append(part)
    log.finish()
    skipped = min(produced, 1)
    assert log.first_seq == skipped
    assert began == log.position
    assert began[:3] == (3, 5 * skipped, fingerprint(0, 5) if skipped else 0)
    assert began.shuffle == (None if skipped else other)
    assert log.skip_rows == 0
    assert log.waiting_bytes == log.leased_bytes == 10 * (5 - skipped)


def test_a_position_in_one_order_says_nothing_in_another() -> None:
    before, other = ShuffleKey(20, 5, 1), ShuffleKey(40, 5, 1)
    shuffled, in_order = Position(3, 10, 7, shuffle=before, low=1), Position(3, 10, 7)
    assert shuffled.under(ShuffleKey(20, 5, 2)) == shuffled
    assert shuffled.under(other) == shuffled.under(None) == Position(3)
    assert in_order.under(other) == in_order


def test_who_begins_to_shuffle_in_the_middle_has_no_order_of_the_whole_split() -> None:
    log = SplitLog(0, Position(3, 5, fingerprint(0, 5)))
    log.rewind(ShuffleKey(20, 5, 1))
    assert log.shuffle is None
    log.append(Part(object(), 0, 5, 10))
    assert log.position == Position(3, 5, fingerprint(0, 5))


def test_the_slowest_replica_bounds_the_lead_of_the_others_until_it_leaves() -> None:
    ledger = Ledger(1, make_router(1, equal=False, routing="rows"), 20, replicas=2)
    ledger.produce(Part(object(), 0, 5, 10) for _ in range(3))
    assert ledger.route() == {0, 1}
    ledger.acknowledge(0, 10, fed=2)
    assert not ledger.route()
    assert not ledger.credit()
    assert ledger.blockers() == [1], "it is named"
    assert ledger.committed_rows == [0], "not by all"
    assert ledger.leased_bytes == 20, "counted once"
    ledger.leave(1)
    assert ledger.committed_rows == [10]
    assert ledger.route() == {0}
    assert ledger.credit()
    ledger.leave(0)
    assert (ledger.truncated_rows, ledger.leased_rows) == (5, 0)


class LedgerMachine(RuleBasedStateMachine):
    """Produce, read, acknowledge, crash, restart, resume and leave in any order, epoch by epoch."""

    @initialize(
        n=st.integers(1, 5),
        mode=st.sampled_from([(False, "rows"), (True, "rows"), ("pad", "rows"), (False, "demand")]),
        leavers=st.integers(0, 2),
        replicas=st.sampled_from((1, 1, 2, 3)),
    )
    def start(self, n: int, mode: tuple[Equal, str], leavers: int, replicas: int) -> None:
        self.n = n
        self.replicas = replicas
        self.leavers = leavers
        self.equal: Equal = mode[0]
        self.routing = mode[1]
        self.now = 0.0
        self.begin({})

    def begin(self, resume: dict[int, Position]) -> None:
        """Begin an epoch, or go on in it with a new ledger."""
        router = make_router(self.n, equal=self.equal, routing=self.routing)
        self.ledger = Ledger(self.n, router, BUDGET, resume, self.replicas)
        if resume:
            return
        self.parts: list[Part] = []
        self.biggest = 0
        readers = self.n * self.replicas
        self.cursors = [0] * readers
        self.begun = [0] * readers
        self.finished = [0] * readers
        self.committed = [0] * readers
        self.rewound: set[int] = set()
        self.delivered: list[list[tuple[int, int, bool]]] = [[] for _ in range(readers)]
        self.leases: list[list[Part]] = [[] for _ in range(readers)]
        self.sent: list[tuple[int, int, int]] = []

    def readable(self) -> list[int]:
        logs = enumerate(self.ledger.logs)
        return [s for s, log in logs if not log.left and self.cursors[s] < log.next_seq]

    def unfinished(self) -> list[int]:
        logs = enumerate(self.ledger.logs)
        return [s for s, log in logs if not log.left and self.cursors[s] > log.first_seq]

    def present(self) -> list[int]:
        return [s for s, log in enumerate(self.ledger.logs) if not log.left]

    @precondition(lambda self: self.ledger.credit() > 0)
    @rule(rows=st.lists(st.integers(1, 60), min_size=1, max_size=8))
    def produce(self, rows: Sequence[int]) -> None:
        credit = self.ledger.credit()
        taken = []
        for count in rows:
            if credit <= 0:
                break
            taken.append(part(count, len(self.parts)))
            self.biggest = max(self.biggest, taken[-1].size_bytes)
            self.parts.append(taken[-1])
            credit -= taken[-1].size_bytes
        self.ledger.produce(taken)
        self.ledger.route(self.now)

    @precondition(lambda self: self.parts and not self.ledger.finished)
    @rule()
    def finish(self) -> None:
        self.ledger.finish()
        self.ledger.route(self.now)

    @precondition(lambda self: self.readable())
    @rule(which=st.integers(0, 4), count=st.integers(1, 4))
    def pull(self, which: int, count: int) -> None:
        split = self.readable()[which % len(self.readable())]
        log = self.ledger.logs[split]
        leases = log.read(self.cursors[split], max_leases=count)
        for lease in leases:
            assert lease.seq == self.cursors[split]
            self.cursors[split] += 1
            if lease.seq == len(self.leases[split]):
                self.leases[split].append(lease.part)
            assert lease.part == self.leases[split][lease.seq], "what comes again is the same"
            block = cast("int", lease.part.block)
            rows = range(lease.part.start, lease.part.stop)
            self.delivered[split].extend((block, row, lease.part.padding) for row in rows)

    @precondition(lambda self: self.unfinished())
    @rule(which=st.integers(0, 4), share=st.sampled_from(SHARES), fed=st.sampled_from(SHARES))
    def acknowledge(self, which: int, share: float, fed: float) -> None:
        split = self.unfinished()[which % len(self.unfinished())]
        log = self.ledger.logs[split]
        begun = log.first_seq + round((self.cursors[split] - log.first_seq) * fed)
        rows = sum(
            lease.part.rows
            for lease in log.read(log.first_seq, max_leases=1000)
            if lease.seq < begun
        )
        first = log.read(log.first_seq, max_leases=1)
        base = first[0].first_row if first else log.assigned_rows
        self.finished[split] = max(self.finished[split], base + int(rows * share))
        self.begun[split] = max(self.begun[split], begun)
        self.sent.append((split, base + int(rows * share), begun))
        self.ledger.acknowledge(split, base + int(rows * share), fed=begun)
        self.ledger.route(self.now)

    @precondition(lambda self: self.routing == "demand")
    @rule(
        which=st.integers(0, 14),
        ahead=st.integers(-100, 100),
        rows=st.integers(0, 100),
        row_s=st.sampled_from((0.0, 0.0001, 1.0, 100.0)),
        later_s=st.sampled_from((0.0, 0.01, 1.0, 100.0)),
    )
    def ask(self, which: int, ahead: int, rows: int, row_s: float, later_s: float) -> None:
        self.now += later_s
        self.ledger.ask(which % len(self.ledger.logs), ahead, rows, rows * row_s, self.now)
        self.ledger.route(self.now)

    @precondition(lambda self: self.parts and self.ledger.route_at is not None)
    @rule()
    def wait(self) -> None:
        assert self.ledger.route_at is not None
        self.now = self.ledger.route_at
        self.ledger.route(self.now)

    @precondition(lambda self: self.sent)
    @rule(which=st.integers(0))
    def repeat_an_old_message(self, which: int) -> None:
        split, rows, fed = self.sent[which % len(self.sent)]
        if self.ledger.logs[split].left:
            return
        self.ledger.acknowledge(split, rows, fed=fed)
        self.begun[split] = max(self.begun[split], min(fed, self.cursors[split]))
        self.ledger.route(self.now)

    @precondition(lambda self: self.routing == "rows" and self.parts)
    @rule(saved=st.booleans())
    def begin_anew_from_positions(self, saved: bool) -> None:
        """A coordinator is restarted, and consumers keep what they have begun; or a run resumes."""
        resume = {}
        for split, log in enumerate(self.ledger.logs):
            if log.left:
                resume[split] = Position(0, FINISHED)
                continue
            rows, check, first_row = self.finished[split], 0, 0
            for leased in self.leases[split]:
                if first_row < rows:
                    check = fingerprint(check, leased.rows)
                first_row += leased.rows
            self.cursors[split] = 0 if saved else self.begun[split]
            resume[split] = Position(0, rows, check, self.cursors[split])
        ended = self.ledger.finished
        self.begin(resume)
        for taken in self.parts:
            self.ledger.produce([taken])
            self.ledger.route(self.now)
        if ended:
            self.ledger.finish()
            self.ledger.route(self.now)
        for split, log in enumerate(self.ledger.logs):
            self.rewound.add(split)
            if resume[split].rows == FINISHED:
                self.ledger.leave(split)
                self.delivered[split].clear()
                continue
            if saved:
                self.begun[split] = self.cursors[split] = log.first_seq
                self.sent = [message for message in self.sent if message[0] != split]
            keep = sum(leased.rows for leased in self.leases[split][: self.cursors[split]])
            del self.delivered[split][max(keep, self.finished[split] if saved else 0) :]
            if saved:
                del self.delivered[split][keep:]

    @precondition(lambda self: self.parts and self.ledger.complete and not self.readable())
    @rule()
    def begin_the_next_epoch(self) -> None:
        self.begin({})

    @precondition(lambda self: self.unfinished())
    @rule(which=st.integers(0, 4))
    def crash(self, which: int) -> None:
        split = self.unfinished()[which % len(self.unfinished())]
        log = self.ledger.logs[split]
        self.ledger.rewind(split)
        self.rewound.add(split)
        self.cursors[split] = self.begun[split] = log.first_seq
        first = log.read(self.cursors[split], max_leases=1)
        keep = first[0].first_row if first else log.assigned_rows
        assert keep + log.skip_rows == log.committed_rows
        del self.delivered[split][keep:]

    @precondition(lambda self: self.leavers and self.parts and self.present())
    @rule(which=st.integers(0, 4))
    def leave(self, which: int) -> None:
        self.leavers -= 1
        self.ledger.leave(self.present()[which % len(self.present())])
        self.ledger.route(self.now)

    @invariant()
    def every_row_is_in_one_place(self) -> None:
        ledger = self.ledger
        logs = ledger.logs
        assert ledger.produced_rows + ledger.router.padded_rows == (
            ledger.router.unassigned_rows
            + ledger.leased_rows
            + sum(ledger.committed_rows)
            + ledger.truncated_rows
        )
        assert ledger.leased_rows >= 0
        assert all(log.leased_rows >= 0 for log in logs)
        fellows = [logs[i : i + self.replicas] for i in range(0, len(logs), self.replicas)]
        assert ledger.leased_bytes == sum(max(log.leased_bytes for log in of) for of in fellows)
        for of, committed in zip(fellows, ledger.committed_rows, strict=True):
            assert all(log.left or log.committed_rows >= committed for log in of), "by all"

    @invariant()
    def nothing_waits_beyond_the_budget_and_one_block(self) -> None:
        """For one who takes a split over, all that is leased waits again."""
        for split, log in enumerate(self.ledger.logs):
            if split not in self.rewound:
                assert log.waiting_bytes < BUDGET + self.biggest

    @invariant()
    def what_is_committed_stays_committed(self) -> None:
        """Also where a replica that is behind keeps rows from being leased again."""
        for split, log in enumerate(self.ledger.logs):
            if not log.left:
                assert log.position.rows >= self.committed[split]
                self.committed[split] = log.position.rows

    @invariant()
    def no_row_goes_to_two_splits(self) -> None:
        for replica in range(self.replicas):
            share = self.delivered[replica :: self.replicas]
            seen = [row for rows in share for row in rows if not row[-1]]
            assert len(seen) == len(set(seen))

    @invariant()
    def replicas_of_a_split_get_the_same(self) -> None:
        for reader, leases in enumerate(self.leases):
            first = self.leases[reader - reader % self.replicas]
            assert all(mine == its for mine, its in zip(leases, first, strict=False))

    @invariant()
    def equal_ends_are_equal(self) -> None:
        if self.equal and self.ledger.complete:
            assert len({log.assigned_rows for log in self.ledger.logs}) == 1

    @invariant()
    def padded_ends_have_every_row(self) -> None:
        ledger = self.ledger
        padded = ledger.router.padded_rows
        assert padded < self.n
        if self.equal == "pad" and ledger.complete:
            rows = ledger.produced_rows + padded
            assert all(log.assigned_rows * self.n == rows for log in ledger.logs)

    @invariant()
    def somebody_can_always_go_on(self) -> None:
        """Without credit, somebody holds data they have not begun, or nothing is to come."""
        ledger = self.ledger
        present = [log for log in ledger.logs if not log.left]
        if present and not ledger.complete and ledger.credit() <= 0:
            assert any(log.waiting for log in present) or ledger.route_at is not None

    @invariant()
    def it_is_never_too_late_to_look_again(self) -> None:
        assert self.ledger.route_at is None or self.ledger.route_at > self.now


# Coverage would make it several times slower.
TestLedger = pytest.mark.no_cover(LedgerMachine.TestCase)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.integers(1, 1000),
    st.sampled_from((False, True, "pad")),
)
def test_waiting_bytes_stay_within_budget_and_a_block(
    sizes: list[int], budget: int, equal: Equal
) -> None:
    ledger = Ledger(3, make_router(3, equal=equal, routing="rows"), budget)
    for rows in sizes:
        if ledger.credit() > 0:
            ledger.produce([part(rows)])
            ledger.route()
    ledger.finish()
    ledger.route()
    for log in ledger.logs:
        assert log.waiting_bytes < budget + max(sizes) * 8
