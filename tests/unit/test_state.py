"""Saved positions that are damaged, foreign or from another version."""

from typing import Any

import pytest

from asyncsplit import StateMismatchError
from asyncsplit.core.ledger import Position
from asyncsplit.core.state import position_from, state_of

GOOD = state_of(Position(3, 120, 77), split=1, n=2)


def test_a_state_comes_back_as_the_position_it_was() -> None:
    assert position_from(GOOD, 1, 2) == Position(3, 120, 77, saved=True)
    other = state_of(Position(3, 90, 5), split=0, n=2)
    assert position_from([other, GOOD], 1, 2) == Position(3, 120, 77, saved=True)


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
        ([GOOD], "1 states, 1 of them of split 1, cannot be loaded into n=2"),
        ([GOOD, GOOD], "2 states, 2 of them of split 1"),
    ],
)
def test_what_is_no_state_of_this_split_is_refused(state: Any, message: str) -> None:
    with pytest.raises(StateMismatchError, match=message):
        position_from(state, 1, 2)
