"""Which split gets what, for the three ways of routing."""

import gc
import weakref
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncsplit.core.routing import (
    Assignment,
    DemandRouter,
    Equal,
    EqualRouter,
    Part,
    RowsRouter,
    make_router,
)
from tests.profiles import FEWER

ways_to_share = st.sampled_from((False, True, "pad"))


def parts(sizes: Sequence[int], nodes: Sequence[str | None] = ()) -> list[Part]:
    nodes = list(nodes) or [None] * len(sizes)
    return [
        Part(i, 0, rows, rows * 8, node)
        for i, (rows, node) in enumerate(zip(sizes, nodes, strict=True))
    ]


class Block:
    """Something of which one can tell whether it is still kept."""


def route_all(router: RowsRouter, sizes: Sequence[int], hungry: set[int]) -> list[Assignment]:
    out: list[Assignment] = []
    for part in parts(sizes):
        router.add(part)
        out += router.assign(hungry)
    router.finish()
    return [*out, *router.assign(hungry)]


def rows_of(assignments: Sequence[Assignment], n: int) -> list[int]:
    return [sum(part.rows for split, part in assignments if split == s) for s in range(n)]


def test_ten_blocks_over_three_splits_by_rows() -> None:
    out = route_all(RowsRouter(3), [100] * 10, set())
    assert sorted(rows_of(out, 3)) == [300, 300, 400]


def test_ten_blocks_over_three_splits_equal() -> None:
    router = EqualRouter(3)
    out = route_all(router, [100] * 10, set())
    assert rows_of(out, 3) == [333, 333, 333]
    assert router.truncated_rows == 1


def test_one_row_over_two_splits() -> None:
    assert sorted(rows_of(route_all(RowsRouter(2), [1], set()), 2)) == [0, 1]
    router = EqualRouter(2)
    assert rows_of(route_all(router, [1], set()), 2) == [0, 0]
    assert router.truncated_rows == 1


@given(
    n=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 50), max_size=40),
    equal=st.booleans(),
)
def test_every_row_goes_to_one_split_or_is_truncated(n: int, sizes: list[int], equal: bool) -> None:
    router = make_router(n, equal=equal, routing="rows")
    out = route_all(router, sizes, set())
    seen = [(part.block, row) for _, part in out for row in range(part.start, part.stop)]
    assert len(seen) == len(set(seen))
    assert len(seen) + router.truncated_rows == sum(sizes)
    assert router.unassigned_rows == router.unassigned_bytes == 0
    assert rows_of(out, n) == router.rows
    if equal:
        assert set(router.rows) == {sum(sizes) // n}
        assert router.truncated_rows == sum(sizes) % n
    else:
        assert router.truncated_rows == 0
        assert max(router.rows) - min(router.rows) <= max(sizes, default=0)


def test_three_rows_over_eight_splits_padded() -> None:
    router = make_router(8, equal="pad", routing="rows")
    out = route_all(router, [2, 1], set())
    given = {split: (part.block, part.start, part.padding) for split, part in out}
    assert [given[split][:2] for split in range(8)] == [
        *((0, 0), (0, 1), (1, 0)),
        *((0, 0), (0, 1), (1, 0), (0, 0), (0, 1)),
    ], "those there are, over and over"
    assert [given[split][2] for split in range(8)] == [False] * 3 + [True] * 5
    assert router.padded_rows == 5


@FEWER
@given(n=st.integers(1, 9), sizes=st.lists(st.integers(1, 50), max_size=40))
def test_padded_shares_are_equal_and_have_every_row(n: int, sizes: list[int]) -> None:
    router = make_router(n, equal="pad", routing="rows")
    out = route_all(router, sizes, set())
    rows: dict[bool, list[tuple[object, int]]] = {False: [], True: []}
    for _, part in out:
        rows[part.padding] += [(part.block, row) for row in range(part.start, part.stop)]
    every = [(block, row) for block, size in enumerate(sizes) for row in range(size)]
    assert sorted(rows[False], key=repr) == sorted(every, key=repr), "each row once"
    share = -(-len(every) // n)
    assert rows_of(out, n) == router.rows == [share] * n
    assert len(rows[True]) == router.padded_rows == n * share - len(every) < n
    again = Counter(rows[True])
    assert again.keys() == set(every[len(every) - router.padded_rows :] if every else ()) or (
        again.keys() == set(every) and max(again.values()) - min(again.values()) <= 1
    ), "the last ones once more; if there are not enough of them, all, as evenly as possible"
    for split in range(n):
        padding = [part.padding for s, part in out if s == split]
        assert padding == sorted(padding), "at the end of each share"
    assert router.complete
    assert not any(router.may_get_more(split) for split in range(n))
    assert router.truncated_rows == router.unassigned_rows == router.unassigned_bytes == 0
    assert route_all(make_router(n, equal="pad", routing="rows"), sizes, set()) == out


def test_no_more_blocks_are_kept_for_padding_than_it_may_need() -> None:
    kept = [Block() for _ in range(6)]
    refs = [weakref.ref(block) for block in kept]
    router = make_router(3, equal="pad", routing="rows")
    for rows in (9, 9, 9, 9, 1, 9):
        router.add(Part(kept.pop(0), 0, rows, 8 * rows))
        list(router.assign(()))
    router.finish()
    given_out = router.assign(())
    while not next(given_out).part.padding:
        pass
    gc.collect()
    assert [ref() is not None for ref in refs] == [False] * 5 + [True]
    list(given_out)
    gc.collect()
    assert not any(ref() for ref in refs)


@FEWER
@given(
    n=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 50), max_size=30),
    equal=ways_to_share,
    hungry=st.lists(st.sets(st.integers(0, 5)), min_size=31, max_size=31),
)
def test_shares_by_rows_do_not_depend_on_timing(
    n: int, sizes: list[int], equal: Equal, hungry: list[set[int]]
) -> None:
    steady = route_all(make_router(n, equal=equal, routing="rows"), sizes, set())
    router = make_router(n, equal=equal, routing="rows")
    out: list[Assignment] = []
    for part, who in zip(parts(sizes), hungry, strict=False):
        router.add(part)
        if who:
            out += router.assign(who)
    router.finish()
    out += router.assign(hungry[-1])
    for split in range(n):
        mine = [part for s, part in out if s == split]
        assert mine == [part for s, part in steady if s == split]


@given(n=st.integers(1, 6), sizes=st.lists(st.integers(1, 50), max_size=30))
def test_blocks_of_a_split_keep_the_order_of_the_dataset(n: int, sizes: list[int]) -> None:
    for equal in (False, True):
        out = route_all(make_router(n, equal=equal, routing="rows"), sizes, set())
        for split in range(n):
            mine = [(part.block, part.start) for s, part in out if s == split]
            assert mine == sorted(mine)


def test_demand_gives_only_to_the_hungry() -> None:
    router = DemandRouter(3)
    for part in parts([10] * 4):
        router.add(part)
    assert list(router.assign(set())) == []
    assert {split for split, _ in router.assign({2})} == {2}
    assert {split for split, _ in router.assign({0, 2})} == {0, 2}
    router.leave(0)
    assert list(router.assign({0})) == []
    assert [split for split, _ in router.assign({0, 1})] == [1]


def test_demand_truncates_what_nobody_is_left_to_take() -> None:
    router = DemandRouter(2)
    for part in parts([10, 10]):
        router.add(part)
    router.leave(0)
    assert router.truncated_rows == 0
    router.leave(1)
    assert router.truncated_rows == 20
    assert router.unassigned_rows == 0


def test_hints_prefer_blocks_on_the_splits_node() -> None:
    router = make_router(2, equal=False, routing="rows", hints=["a", "b"])
    for part in parts([10] * 8, ["b", "b", "a", "a", "b", "a", "b", "a"]):
        router.add(part)
    router.finish()
    out = list(router.assign(set()))
    assert all(part.node == "ab"[split] for split, part in out)
    assert len(out) == 8


def test_hints_do_not_keep_a_hungry_split_waiting() -> None:
    router = make_router(2, equal=False, routing="rows", hints=["a", "b"])
    router.add(parts([10], ["b"])[0])
    assert list(router.assign(set())) == []
    assert [split for split, _ in router.assign({0, 1})] == [0]


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_cutting_a_part_loses_no_rows_or_bytes(rows: int) -> None:
    part = Part("block", 3, 13, 101)
    head, tail = part.cut(rows)
    assert (head.start, head.stop, tail.start, tail.stop) == (3, 3 + rows, 3 + rows, 13)
    assert head.size_bytes + tail.size_bytes == 101
