"""Saved positions that are damaged, foreign or from another version."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from asyncsplit import StateMismatchError
from asyncsplit.core.position import FINISHED, Past, Position
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.core.state import check_shuffle, position_from, state_of

GOOD = state_of(Position(3, 120, 77), split=1, n=2)


def test_a_state_comes_back_as_the_position_it_was() -> None:
    assert position_from(GOOD, 1, 2) == Position(3, 120, 77, saved=True)
    other = state_of(Position(3, 90, 5), split=0, n=2)
    assert position_from([other, GOOD], 1, 2) == Position(3, 120, 77, saved=True)


def states(*positions: Position) -> list[dict[str, Any]]:
    return [state_of(position, i, len(positions)) for i, position in enumerate(positions)]


def test_the_states_of_another_number_of_splits_are_what_is_left_for_all() -> None:
    earlier = ((Past(120, 7), Past(FINISHED, 0), Past(0, 0)),)
    mixed = states(Position(3, 120, 7), Position(4), Position(3))
    assert position_from(mixed, 1, 2) == Position(3, saved=True, earlier=earlier)
    again = json.loads(json.dumps(states(*[Position(3, 5, 9, earlier=earlier)] * 2)))
    twice = (*earlier, (Past(5, 9), Past(5, 9)))
    assert position_from(again, 0, 2) == Position(3, 5, 9, saved=True, earlier=earlier)
    assert position_from(again, 3, 4) == Position(3, saved=True, earlier=twice)
    between = states(Position(3), Position(3))
    assert position_from(between, 2, 3) == Position(3, saved=True), "nothing is left out"


def test_the_states_of_replicas_count_once_if_they_agree() -> None:
    first, second = states(Position(3, 10, 5), Position(3, 20, 6))
    assert position_from([first, first, second, second], 1, 2) == Position(3, 20, 6, saved=True)
    behind = {**first, "rows": 8}
    with pytest.raises(StateMismatchError, match="all replicas, saved at the same step"):
        position_from([first, behind, second, second], 1, 2)


def test_a_shuffled_state_comes_back() -> None:
    shuffled = Position(3, 120, 77, shuffle=ShuffleKey(100, 10, 2**63 - 1), low=2)
    state = json.loads(json.dumps(state_of(shuffled, 0, 1)))
    assert position_from(state, 0, 1) == shuffled._replace(saved=True)
    with pytest.raises(StateMismatchError, match="epoch 3 was shuffled locally by 1 splits"):
        position_from([state], 0, 2)


@pytest.mark.parametrize(
    "positions",
    [
        (Position(3), Position(5)),
        (Position(3), Position(4, 10)),
        (Position(3, 1), Position(3, earlier=((Past(1, 1),),))),
    ],
)
def test_states_of_different_moments_are_refused(positions: Sequence[Position]) -> None:
    with pytest.raises(StateMismatchError, match="not saved at the same time by the same run"):
        position_from(states(*positions), 0, 3)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "is no state"),
        ("{}", "is no state"),
        ({}, "version=None should be an int"),
        ({**GOOD, "version": 2}, "reads version 1"),
        ({**GOOD, "rows": -1}, "rows=-1 should be an int from 0 on"),
        ({**GOOD, "epoch": "3"}, "epoch='3'"),
        ({k: v for k, v in GOOD.items() if k != "check"}, "check=None"),
        ({**GOOD, "split": 0}, "split 0 of 2 cannot be loaded into split 1 of 2"),
        ({**GOOD, "world_size": 4}, "split 1 of 4 cannot be loaded into split 1 of 2"),
        ([], "0 states, of splits none, are not those of one run"),
        ([GOOD], "1 states, of splits 1 of 2, are not those of one run"),
        ([GOOD, GOOD], "2 states, of splits 1 of 2, 1 of 2, are not those of one run"),
        ({**GOOD, "shuffle": [100, 10]}, "shuffle=.* should be three ints from 0 on"),
        ({**GOOD, "shuffle": [100, 10, 7]}, "low=None should be an int from 0 on"),
        ({**GOOD, "earlier": [[[1, 2], [3]]]}, "earlier=.* should be lists of pairs of ints"),
    ],
)
def test_what_is_no_state_of_this_split_is_refused(state: Any, message: str) -> None:
    with pytest.raises(StateMismatchError, match=message):
        position_from(state, 1, 2)


KEY = ShuffleKey(100, 10, 3)


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (None, KEY),
        (KEY, None),
        (KEY, KEY._replace(batch_size=5)),
        (KEY._replace(buffer_size=9), KEY),
    ],
)
def test_an_epoch_is_not_resumed_in_another_order(
    saved: ShuffleKey | None, now: ShuffleKey | None
) -> None:
    position = Position(3, 20, saved=True, shuffle=saved)
    with pytest.raises(StateMismatchError, match=r"split 7 .* with local_.* with local_.*the same"):
        check_shuffle(position, now, 7)
    check_shuffle(position._replace(rows=0), now, 7)
    check_shuffle(position._replace(saved=False), now, 7)


def test_an_epoch_is_resumed_in_the_order_it_had() -> None:
    check_shuffle(Position(3, 20, saved=True, shuffle=KEY), KEY._replace(seed=4), 7)
    check_shuffle(Position(3, 20, saved=True), None, 7)
    check_shuffle(None, KEY, 7)
