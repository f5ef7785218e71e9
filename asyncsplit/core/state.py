"""Saved positions: what `state_dict` returns and `load_state_dict` takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from asyncsplit.core.position import FINISHED, Past, Position
from asyncsplit.core.shuffle import ShuffleKey, sizes
from asyncsplit.errors import StateMismatchError

VERSION = 1
FIELDS = ("version", "split", "world_size", "epoch", "rows", "check")


def state_of(position: Position, split: int, n: int) -> dict[str, Any]:
    """Return a position as a saved state.

    In the middle of a shuffled epoch it has four integers more: ``low``, and ``shuffle``. If the
    epoch was resumed with another number of splits, it has two for each former split: ``earlier``.
    """
    values = (VERSION, split, n, position.epoch, position.rows, position.check)
    state: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
    if position.shuffle is not None and position.rows:
        state.update(low=position.low, shuffle=list(position.shuffle))
    if position.earlier:
        state["earlier"] = [[list(past) for past in splits] for splits in position.earlier]
    return state


def position_from(
    state: Mapping[str, Any] | Sequence[Mapping[str, Any]], split: int, n: int
) -> Position:
    """Return the position that a state of this split describes, or a list of all splits' states.

    That list may come from a run with another number of splits: then every split begins to read
    what all of those together have not finished.

    Raises:
        StateMismatchError: If it does not describe a position of this split.
    """
    if isinstance(state, Sequence) and not isinstance(state, str | bytes):
        positions = _positions_from(state)
        if len(positions) == n:
            return positions[split]
        return _of_all(positions)
    position, its_split, its_n = _parse(state)
    if (its_split, its_n) != (split, n):
        raise StateMismatchError(
            f"the state of split {its_split} of {its_n} cannot be loaded into split {split} of"
            f" {n}: for another number of splits, pass a list of the states of all {its_n}"
        )
    return position


def check_shuffle(position: Position | None, key: ShuffleKey | None, split: int) -> None:
    """Refuse to go on in the middle of an epoch that was shuffled otherwise than by this key.

    Raises:
        StateMismatchError: If the position comes from a saved state and says so.
    """
    if position is None or not position.saved or not position.rows:
        return
    before = position.shuffle
    if before is not key and (before is None or key is None or not before.is_like(key)):
        raise StateMismatchError(
            f"the state of split {split} was saved with {sizes(before)}, and cannot be resumed in"
            f" the middle of its epoch with {sizes(key)}: use the same"
        )


def _positions_from(states: Sequence[Any]) -> list[Position]:
    """Return the positions of all splits of one run, in order; replicas have to agree."""
    given = sorted(map(_parse, states), key=lambda found: found[1])
    parsed = list(dict.fromkeys(given))
    expected = [(split, len(parsed)) for split in range(len(parsed))]
    if not states or [(split, n) for _, split, n in parsed] != expected:
        found = ", ".join(f"{split} of {n}" for _, split, n in given)
        raise StateMismatchError(
            f"{len(states)} states, of splits {found or 'none'}, are not those of one run: pass"
            " one state of each of its splits, or those of all replicas, saved at the same step"
        )
    return [position for position, _, _ in parsed]


def _of_all(positions: Sequence[Position]) -> Position:
    """Return where each split begins after a run with another number of splits."""
    epoch = min(position.epoch for position in positions)
    reading = [position for position in positions if position.epoch == epoch]
    finished = [position for position in positions if position == Position(epoch + 1, saved=True)]
    if len(reading) + len(finished) < len(positions) or len({p.earlier for p in reading}) > 1:
        raise StateMismatchError(
            "the states were not saved at the same time by the same run: their epochs are"
            f" {sorted({position.epoch for position in positions})}"
        )
    if any(position.shuffle for position in reading):
        raise StateMismatchError(
            f"epoch {epoch} was shuffled locally by {len(positions)} splits, and cannot be resumed"
            " in the middle by another number: use as many, or states saved between two epochs"
        )
    earlier = reading[0].earlier
    if not earlier and not finished and not any(position.rows for position in reading):
        return Position(epoch, saved=True)
    past = tuple(
        Past(position.rows, position.check) if position.epoch == epoch else Past(FINISHED, 0)
        for position in positions
    )
    return Position(epoch, saved=True, earlier=(*earlier, past))


def _parse(state: object) -> tuple[Position, int, int]:
    """Return the position that a state describes, of which split it is, and of how many."""
    if not isinstance(state, Mapping):
        raise StateMismatchError(
            f"state={state!r} is no state: pass what state_dict() returned, or a list of those"
        )
    for field in FIELDS:
        if not _is_count(state.get(field)):
            raise _damaged(field, state.get(field), "an int from 0 on")
    if state["version"] != VERSION:
        raise StateMismatchError(
            f"the state has version {state['version']}, and this asyncsplit reads version"
            f" {VERSION}: use the asyncsplit that saved it"
        )
    position = Position(state["epoch"], state["rows"], state["check"], saved=True)
    if (shuffle := state.get("shuffle")) is not None:
        if not _is_counts(shuffle, 3):
            raise _damaged("shuffle", shuffle, "three ints from 0 on")
        if not _is_count(state.get("low")):
            raise _damaged("low", state.get("low"), "an int from 0 on")
        position = position._replace(shuffle=ShuffleKey(*shuffle), low=state["low"])
    earlier = state.get("earlier", [])
    if not isinstance(earlier, Sequence) or not all(
        isinstance(splits, Sequence) and all(_is_counts(past, 2) for past in splits)
        for splits in earlier
    ):
        raise _damaged("earlier", earlier, "lists of pairs of ints")
    generations = tuple(tuple(Past(*past) for past in splits) for splits in earlier)
    return position._replace(earlier=generations), state["split"], state["world_size"]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_counts(values: object, number: int) -> bool:
    return isinstance(values, Sequence) and len(values) == number and all(map(_is_count, values))


def _damaged(field: str, value: object, should_be: str) -> StateMismatchError:
    return StateMismatchError(
        f"the state is damaged: {field}={value!r} should be {should_be}. Pass what state_dict()"
        " returned"
    )
