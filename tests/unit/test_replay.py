"""What is left of an epoch for another number of splits."""

from itertools import chain
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncsplit import CoordinatorLostError, StateMismatchError
from asyncsplit.core.position import FINISHED, Past, Position, fingerprint
from asyncsplit.core.replay import Replay, read_before
from asyncsplit.core.routing import Equal, Part, make_router


def dataset(sizes: list[int]) -> list[Part]:
    return [Part(block, 0, rows, 8 * rows) for block, rows in enumerate(sizes)]


def ids(parts: list[Part]) -> list[tuple[int, int]]:
    return [(cast("int", p.block), row) for p in parts for row in range(p.start, p.stop)]


def shares(sizes: list[int], n: int, *, equal: Equal) -> list[list[Part]]:
    """Return what each of n splits gets in a whole epoch."""
    router = make_router(n, equal=equal, routing="rows")
    for part in dataset(sizes):
        router.add(part)
    router.finish()
    got: list[list[Part]] = [[] for _ in range(n)]
    for split, part in router.assign(()):
        got[split].append(part)
    return got


def past(share: list[Part], rows: int) -> Past:
    """Return how far a split has come that has finished with so many rows."""
    check = first_row = 0
    for part in share:
        if first_row < rows:
            check = fingerprint(check, part.rows)
        first_row += part.rows
    return Past(rows, check)


@given(
    sizes=st.lists(st.integers(1, 30), max_size=30),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    equal=st.sampled_from((False, True, "pad")),
    at_once=st.integers(1, 10),
)
def test_what_is_left_is_what_was_not_finished(
    sizes: list[int], cuts: list[float], equal: Equal, at_once: int
) -> None:
    given_out = shares(sizes, len(cuts), equal=equal)
    rows = [int(cut * len(ids(share))) for cut, share in zip(cuts, given_out, strict=True)]
    replay = Replay([past(*at) for at in zip(given_out, rows, strict=True)], equal=equal)
    parts, left = dataset(sizes), []
    for first in range(0, len(parts), at_once):
        left += replay.rest(parts[first : first + at_once])
    left += replay.finish()
    own = [[part for part in share if not part.padding] for share in given_out]
    unfinished = [ids(share)[row:] for share, row in zip(own, rows, strict=True)]
    assert sorted(ids(left)) == sorted(chain(*unfinished))


def test_a_split_that_had_finished_leaves_nothing() -> None:
    replay = Replay([Past(FINISHED, 0), Past(0, 0)], equal=False)
    left = replay.rest(dataset([5, 7])) + replay.finish()
    assert ids(left) == ids(shares([5, 7], 2, equal=False)[1])


@pytest.mark.parametrize("sizes", [[5, 6], [4, 7, 5, 5], [5]])
def test_other_blocks_are_refused(sizes: list[int]) -> None:
    given_out = shares([5, 7, 5, 5], 2, equal=False)
    replay = Replay([past(share, 9) for share in given_out], equal=False)

    def read() -> list[Part]:
        return replay.rest(dataset(sizes)) + replay.finish()

    with pytest.raises(StateMismatchError, match="blocks are not those that were read before"):
        read()


def test_going_on_in_an_epoch_needs_blocks_that_come_again() -> None:
    assert read_before({}, 2, 3, repeatable=False) == ()
    alive = {0: Position(3, 10)}
    assert read_before(alive, 2, 3, repeatable=True) == ()
    with pytest.raises(CoordinatorLostError, match="preserve_order = True"):
        read_before(alive, 2, 3, repeatable=False)
    saved = {0: Position(3, 10, saved=True)}
    with pytest.raises(StateMismatchError, match=r"splits \[1\] have no state"):
        read_before(saved, 2, 3, repeatable=True)
    with pytest.raises(StateMismatchError, match="epoch 3 cannot be resumed in the middle"):
        read_before(saved, 1, 3, repeatable=False)


def test_positions_in_one_epoch_know_of_the_same_earlier_runs() -> None:
    earlier = ((Past(5, 1), Past(6, 2)),)
    one, other = Position(3, earlier=earlier), Position(3, 4)
    over = Position(3, FINISHED)
    assert read_before({0: one, 1: over, 2: one}, 3, 3, repeatable=True) == earlier
    with pytest.raises(StateMismatchError, match="states of different runs"):
        read_before({0: one, 1: other}, 2, 3, repeatable=True)
