"""Giving on demand: who gets which block when, with consumers of constant speeds."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from asyncsplit.core.ledger import Ledger
from asyncsplit.core.pace import HORIZON_S, PATIENCE
from asyncsplit.core.routing import Part, make_router

BUDGET = 10**9


@dataclass
class Consumer:
    """Goes through its blocks at its own pace, and asks for more when it begins the last one."""

    row_s: float
    asks_until: float = inf
    given: list[int] = field(default_factory=list)
    """Rows of each of its blocks."""
    free_at: float = 0.0
    idle_s: float = 0.0
    """The longest that it had nothing and got something."""


class Job:
    """A ledger that has a whole dataset, and consumers, in simulated time."""

    def __init__(self, sizes: Sequence[int], consumers: Sequence[Consumer], trip_s: float) -> None:
        self.consumers = consumers
        self.messages = 0
        self._trip_s = trip_s
        router = make_router(len(consumers), equal=False, routing="demand")
        self._ledger = ledger = Ledger(len(consumers), router, BUDGET)
        ledger.produce(Part(number, 0, rows, rows) for number, rows in enumerate(sizes))
        ledger.finish()
        self._asks: list[tuple[float, int]] = []

    def run(self) -> float:
        """Return when the last one is done."""
        now = 0.0
        self._route(now)
        while (looks_at := self._ledger.route_at) is not None or self._asks:
            asked_at = self._asks[0][0] if self._asks else inf
            if looks_at is not None and looks_at < asked_at:
                assert looks_at > now, "time goes on"
                now = looks_at
            else:
                now, who = heapq.heappop(self._asks)
                if now > self.consumers[who].asks_until:
                    continue
                self._ask(who, now)
            self._route(now)
        return max(each.free_at for each in self.consumers)

    @property
    def unassigned_rows(self) -> int:
        return self._ledger.router.unassigned_rows

    def _route(self, now: float) -> None:
        for who in self._ledger.route(now):
            each, log = self.consumers[who], self._ledger.logs[who]
            here = now + self._trip_s
            each.idle_s = max(each.idle_s, here - each.free_at if each.given else 0.0)
            each.free_at = begins_at = max(each.free_at, here)
            for lease in log.read(log.first_seq, max_leases=len(self.consumers) * 1000):
                if lease.seq >= len(each.given):
                    each.given.append(lease.part.rows)
                    begins_at = each.free_at
                    each.free_at += lease.part.rows * each.row_s
            heapq.heappush(self._asks, (begins_at + self._trip_s, who))

    def _ask(self, who: int, now: float) -> None:
        self.messages += 1
        each = self.consumers[who]
        ahead, rows = each.given[-1], sum(each.given[:-1])
        self._ledger.ask(who, ahead, rows, rows * each.row_s, now)
        self._ledger.acknowledge(who, rows, fed=len(each.given))


def list_schedule_s(sizes: Sequence[int], paces: Sequence[float]) -> float:
    """Return when all is done if each block goes to whoever is done with it first."""
    free = [0.0] * len(paces)
    for rows in sizes:
        who = min(range(len(paces)), key=lambda i: free[i] + rows * paces[i])
        free[who] += rows * paces[who]
    return max(free)


def test_one_ten_times_slower_is_close_to_the_ideal_with_few_messages() -> None:
    sizes, paces = [256] * 240, [0.05 / 256] + [0.005 / 256] * 3
    job = Job(sizes, [Consumer(row_s) for row_s in paces], trip_s=0.001)
    assert job.run() < 1.03 * list_schedule_s(sizes, paces)
    assert len(job.consumers[0].given) in (7, 8)
    assert job.messages < 80
    assert all(each.idle_s < 0.004 for each in job.consumers[1:])


def test_a_slow_one_that_would_be_last_leaves_the_rest_to_the_others() -> None:
    job = Job([1] * 100, [Consumer(10.0), Consumer(0.1)], trip_s=0.0)
    assert job.run() == 20.0, "two before anybody knew how slow it is"
    job = Job([1] * 400, [Consumer(10.0), Consumer(0.1)], trip_s=0.0)
    assert len(job.consumers[0].given) == 0
    assert job.run() < 41.0


paces = st.floats(1e-4, 10.0)
jobs = st.tuples(st.lists(st.integers(1, 50), max_size=80), st.lists(paces, min_size=1, max_size=6))


@given(job=jobs)
def test_no_order_of_speeds_and_sizes_takes_much_longer_than_the_ideal(
    job: tuple[list[int], list[float]],
) -> None:
    """Until something is first left to others, nobody is idle; then they are through soon.

    So the last block is given after what all would take if rows could be shared out exactly, and
    two blocks. Whoever gets it has up to a block or `HORIZON_S` before it.
    """
    sizes, row_s = job
    took_s = Job(sizes, [Consumer(each) for each in row_s], trip_s=0.0)
    exactly_s = sum(sizes) / sum(1 / each for each in row_s)
    block_s = max(sizes, default=0) * max(row_s)
    assert took_s.run() <= exactly_s + 4 * block_s + HORIZON_S
    assert took_s.unassigned_rows == 0


@given(job=jobs, asks_until=st.lists(st.floats(0.0, 50.0), min_size=5, max_size=5))
def test_what_is_not_given_to_those_who_fall_silent_the_others_get_soon(
    job: tuple[list[int], list[float]], asks_until: list[float]
) -> None:
    """Nobody waits longer for more than two of its own blocks take, as long as there are some."""
    sizes, row_s = job
    silent = [Consumer(each, until) for each, until in zip(row_s[1:], asks_until, strict=False)]
    lives = Consumer(row_s[0])
    took_s = Job(sizes, [lives, *silent], trip_s=0.0)
    took_s.run()
    assert took_s.unassigned_rows == 0
    assert lives.idle_s <= 1.001 * PATIENCE * max(sizes, default=0) * lives.row_s


def test_a_long_pause_is_forgotten_and_who_runs_out_gets_more_at_once() -> None:
    ledger = Ledger(1, make_router(1, equal=False, routing="demand"), BUDGET)
    ledger.produce(Part(number, 0, 10, 10) for number in range(1000))
    log = ledger.logs[0]
    now = finished = 0.0

    def ask(rows_ahead: int, row_s: float) -> float | None:
        """Finish all but the last block within so much time per row; return what it has to wait."""
        nonlocal now, finished
        rows = log.assigned_rows - 10
        busy_s = (rows - log.committed_rows) * row_s
        now += busy_s
        finished += busy_s
        ledger.ask(0, rows_ahead, rows, finished, now)
        ledger.acknowledge(0, rows, fed=log.next_seq)
        ledger.route(now)
        return None if log.waiting else ledger.held_until(0) - now

    ledger.route()
    assert ask(10, 1.0) is None, "nothing is known"
    assert ask(10, 1.0) == 8.0, "10 s less a fifth"
    assert not ledger.route(now + 7.9)
    assert ledger.route(now + 8.0) == {0}
    assert log.waiting == 1
    assert ask(10, 600.0) == 8.0, "a pause of ten minutes is no pace"
    ledger.ask(0, 0, log.committed_rows, finished, now)
    assert ledger.route(now) == {0}


def test_who_lacks_rows_for_a_batch_gets_them_together_and_small_blocks_for_a_while() -> None:
    ledger = Ledger(1, make_router(1, equal=False, routing="demand"), BUDGET)
    ledger.produce(Part(number, 0, 10, 10) for number in range(1000))
    log = ledger.logs[0]
    ledger.route()
    ledger.ask(0, -10, 0, 0.0, 0.0)
    ledger.acknowledge(0, 0, fed=1)
    ledger.route(0.0)
    assert log.waiting == 1, "its pace is not known"
    ledger.ask(0, -100, 20, 20.0, 20.0)
    ledger.acknowledge(0, 20, fed=2)
    ledger.route(20.0)
    assert log.waiting == 10, "a batch of 100 rows"
    ledger.ask(0, 0, 120, 20.3, 20.3)
    ledger.acknowledge(0, 120, fed=12)
    ledger.route(20.3)
    assert log.waiting == 4, "0.003 s for a row"
    assert 3 * 10 * 0.003 < HORIZON_S < 4 * 10 * 0.003
