"""Saved positions: what `state_dict` returns and `load_state_dict` takes."""

from collections.abc import Mapping, Sequence

from asyncsplit.core.ledger import Position
from asyncsplit.errors import StateMismatchError

VERSION = 1
FIELDS = ("version", "split", "world_size", "epoch", "rows", "check")


def state_of(position: Position, split: int, n: int) -> dict[str, int]:
    """Return a position as a saved state."""
    return dict(
        zip(FIELDS, (VERSION, split, n, position.epoch, position.rows, position.check), strict=True)
    )


def position_from(
    state: Mapping[str, int] | Sequence[Mapping[str, int]], split: int, n: int
) -> Position:
    """Return the position a state describes, or that of the split among several.

    Raises:
        StateMismatchError: If it does not describe one of this split.
    """
    if isinstance(state, Sequence) and not isinstance(state, str | bytes):
        mine = [one for one in state if isinstance(one, Mapping) and one.get("split") == split]
        if len(state) != n or len(mine) != 1:
            raise StateMismatchError(
                f"{len(state)} states, {len(mine)} of them of split {split}, cannot be loaded into"
                f" n={n} splits: pass one state of each split, from a run with as many splits"
            )
        state = mine[0]
    if not isinstance(state, Mapping):
        raise StateMismatchError(
            f"state={state!r} is no state: pass what state_dict() returned, or a list of those"
        )
    for field in FIELDS:
        value = state.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise StateMismatchError(
                f"the state is damaged: {field}={value!r} should be an int from 0 on. Pass what"
                " state_dict() returned"
            )
    if state["version"] != VERSION:
        raise StateMismatchError(
            f"the state has version {state['version']}, and this asyncsplit reads version"
            f" {VERSION}: use the asyncsplit that saved it"
        )
    if (state["split"], state["world_size"]) != (split, n):
        raise StateMismatchError(
            f"the state of split {state['split']} of {state['world_size']} cannot be loaded into"
            f" split {split} of {n}"
        )
    return Position(state["epoch"], state["rows"], state["check"], saved=True)
