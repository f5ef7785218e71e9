"""Which rows a shuffle plan draws, and when."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncsplit.core import shuffle
from asyncsplit.core.shuffle import ShuffleKey, ShufflePlan, shared_key, shared_keys
from asyncsplit.errors import StateMismatchError
from tests.profiles import FEWER

counts_of_rows = st.lists(st.integers(0, 40), max_size=30)
sizes = st.integers(1, 30)
seeds = st.integers(0, 2**63)


@pytest.fixture(params=[False, True], ids=["few rows", "many rows"], scope="module", autouse=True)
def many_rows(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have a plan do with a few rows what it does otherwise with very many."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(shuffle, "DRAW_ROWS", 8)
            patch.setattr(shuffle, "_SCAN_RATIO", 0)
        yield


def fill(plan: ShufflePlan, blocks: Iterator[int]) -> None:
    while plan.wants_input:
        if (added := next(blocks, None)) is None:
            plan.finish()
        else:
            plan.add(added)
    plan.refill()


def skip(plan: ShufflePlan, blocks: Iterator[int], rows: int) -> int:
    """Skip so many rows if there are; return how many were."""
    skipped = 0
    while skipped < rows:
        fill(plan, blocks)
        if not (drawn := plan.skip(rows - skipped)):
            break
        skipped += drawn
    return skipped


def advance(plan: ShufflePlan, blocks: Iterator[int]) -> list[int]:
    """Return the input rows of the next draw."""
    fill(plan, blocks)
    rows: list[int] = plan.input_rows(plan.draw()).tolist()
    return rows


def all_rows(plan: ShufflePlan, blocks: Iterator[int]) -> list[int]:
    rows: list[int] = []
    while drawn := advance(plan, blocks):
        rows += drawn
    return rows


def order(counts: Sequence[int], buffer_size: int, batch_size: int, seed: int) -> list[int]:
    return all_rows(ShufflePlan(buffer_size, batch_size, seed), iter(counts))


@given(counts_of_rows, sizes, sizes, seeds)
def test_every_row_is_drawn_once(
    counts: list[int], buffer_size: int, batch_size: int, seed: int
) -> None:
    assert sorted(order(counts, buffer_size, batch_size, seed)) == list(range(sum(counts)))


@FEWER
@given(counts_of_rows, sizes, sizes, seeds)
def test_a_batch_is_drawn_from_a_full_buffer(
    counts: list[int], buffer_size: int, batch_size: int, seed: int
) -> None:
    plan = ShufflePlan(buffer_size, batch_size, seed)
    blocks = iter(counts)
    delivered = 0
    finished = False
    while True:
        while plan.wants_input:
            if (rows := next(blocks, None)) is None:
                plan.finish()
                finished = True
            else:
                plan.add(rows)
        plan.refill()
        if not (drawn := len(plan.draw())):
            break
        delivered += drawn
        if delivered < sum(counts):
            assert drawn % batch_size == 0
        if not finished:
            assert plan.rows_in - delivered + batch_size >= max(buffer_size, batch_size)


@given(counts_of_rows, sizes, sizes, seeds)
def test_no_more_input_is_taken_than_needed(
    counts: list[int], buffer_size: int, batch_size: int, seed: int
) -> None:
    plan = ShufflePlan(buffer_size, batch_size, seed)
    low = max(buffer_size, batch_size)
    delivered = 0
    for rows in counts:
        while not plan.wants_input:
            plan.refill()
            delivered += len(plan.draw())
        assert plan.rows_in - delivered < low + low // 2
        plan.add(rows)


@FEWER
@given(counts_of_rows, sizes, sizes, seeds, st.data())
def test_a_position_is_found_again_without_data(
    counts: list[int], buffer_size: int, batch_size: int, seed: int, data: st.DataObject
) -> None:
    rows = order(counts, buffer_size, batch_size, seed)
    delivered = data.draw(st.integers(0, len(rows)))
    plan = ShufflePlan(buffer_size, batch_size, seed)
    blocks = iter(counts)
    assert skip(plan, blocks, delivered) == delivered
    remaining = plan.remaining().tolist()
    assert remaining == sorted(set(range(plan.rows_in)) - set(rows[:delivered]))
    assert all_rows(plan, blocks) == rows[delivered:]


@given(counts_of_rows, sizes, sizes, seeds)
def test_no_more_is_skipped_than_there_is(
    counts: list[int], buffer_size: int, batch_size: int, seed: int
) -> None:
    plan = ShufflePlan(buffer_size, batch_size, seed)
    assert skip(plan, iter(counts), sum(counts) + 1) == sum(counts)
    assert plan.is_empty
    assert not len(plan.remaining())


def test_the_seed_decides() -> None:
    counts = [100] * 20
    assert order(counts, 300, 32, 7) == order(counts, 300, 32, 7)
    assert order(counts, 300, 32, 7) != order(counts, 300, 32, 8)


@pytest.mark.parametrize("buffer_size", [1, 50, 400])
def test_a_small_input_is_permuted_uniformly(buffer_size: int) -> None:
    # One block is one generation: each of its rows is equally likely anywhere.
    rows, runs = 40, 4000
    where = np.zeros((rows, rows))
    for seed in range(runs):
        where[np.arange(rows), order([rows], buffer_size, 4, seed)] += 1
    expected = runs / rows
    chi_square = ((where - expected) ** 2 / expected).sum()
    freedom = (rows - 1) ** 2
    # Five standard deviations; the seeds are fixed.
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_large_input_is_mixed_throughout() -> None:
    rows, bins = 100_000, 50
    drawn = order([rows], 10, 100, 3)
    assert sorted(drawn) == list(range(rows))
    first = np.bincount(np.array(drawn[: rows // 10]) * bins // rows, minlength=bins)
    expected = rows / 10 / bins
    assert ((first - expected) ** 2 / expected).sum() < bins + 5 * (2 * bins) ** 0.5
    assert abs(np.corrcoef(drawn, np.arange(rows))[0, 1]) < 5 / rows**0.5


def test_places_carried_over_ascend() -> None:
    plan = ShufflePlan(40, 4, 1)
    for _ in range(30):
        while plan.wants_input:
            plan.add(7)
        if (carried := plan.refill()) is not None:
            assert (np.diff(carried) > 0).all()
            assert plan.oldest_row() == plan.input_rows(np.arange(len(carried) + 7)).min()
        plan.draw()


def test_rows_travel_as_far_as_the_buffer_allows() -> None:
    rows = np.array(order([100] * 500, 5000, 50, 1))
    away = rows - np.arange(len(rows))
    # Rows leave after the buffer has been filled and then geometrically, so half of a buffer's
    # size is what an even mix moves them at least.
    assert np.abs(away).mean() > 2500
    neighbours = np.abs(np.diff(rows))
    assert np.median(neighbours) > 1000


def test_replicas_draw_from_what_was_begun_or_first_asked_for() -> None:
    one, two = ShuffleKey(10, 5, 1), ShuffleKey(10, 5, 2)
    assert shared_key(0, [], [one, two]) == one
    assert shared_key(0, [None, two], [one, one]) == two
    assert shared_key(0, [None], [None, None]) is None
    assert shared_key(0, [], []) is None, "nobody is left of a split"
    for other in (None, ShuffleKey(11, 5, 1), ShuffleKey(10, 6, 1)):
        with pytest.raises(ValueError, match="=10 and batch_size=5, and for local_shuffle"):
            shared_key(0, [], [one, other])
    with pytest.raises(StateMismatchError, match="replicas of split 3 resume from states of diff"):
        shared_key(3, [one, two], [one, one])


def test_each_split_has_a_key_of_its_own_that_its_replicas_share() -> None:
    asked = {reader: ShuffleKey(10, 5, reader) for reader in (3, 0, 2)}
    assert shared_keys(1, asked, {0: None}) == asked
    keys = shared_keys(2, asked, {3: ShuffleKey(10, 5, 9), 1: None})
    assert {reader: key and key.seed for reader, key in keys.items()} == {0: 0, 2: 9, 3: 9}
