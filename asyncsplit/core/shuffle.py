"""Which rows a local shuffle hands out next.

A plan sees counts of rows, never data, and decides from them and its seed alone: what it draws
does not depend on when blocks arrive, and a position can be found again without any data.

Upstream: ``ShufflingBatcher`` in ``ray/data/_internal/batcher.py``. It lets the buffer sink to
half of the size asked for and yields short batches in the middle of the stream; a plan does
neither, and like upstream it needs up to one and a half times that size, plus one block.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncsplit.errors import StateMismatchError

Indices = NDArray[np.int64]

DRAW_ROWS = 8192
"""How many rows are drawn at once, for speed. Another number gives another order."""

_SCAN_RATIO = 8
"""How many times as many rows as drawn are looked at one by one. It, too, decides the order."""


class ShuffleKey(NamedTuple):
    """What an order is drawn from: with equal keys, inputs of equal blocks get the same.

    As long as NumPy's generator stays the same: other releases may draw differently.
    """

    buffer_size: int
    batch_size: int
    seed: int

    def is_like(self, other: "ShuffleKey") -> bool:
        """Tell whether only the seed can differ."""
        return self._replace(seed=other.seed) == other


def shared_key(
    split: int, begun: Iterable[ShuffleKey | None], asked: Iterable[ShuffleKey | None]
) -> ShuffleKey | None:
    """Return what the replicas of a split draw their order from: one key for all of them.

    It is that of an order that has begun before, else the first that is asked for.

    Raises:
        StateMismatchError: If they have begun different orders.
        ValueError: If they ask for different sizes.
    """
    keys: list[ShuffleKey | None] = list(dict.fromkeys(filter(None, begun)))
    if len(keys) > 1:
        raise StateMismatchError(
            f"the replicas of split {split} resume from states of different runs: load the states"
            " of one run into all of them"
        )
    keys += asked
    if len(asked_for := {sizes(key): None for key in keys}) > 1:
        raise ValueError(
            f"the replicas of split {split} have to see the same batches, but ask for"
            f" {', and for '.join(asked_for)}: give all of them the same arguments"
        )
    return keys[0] if keys else None


def shared_keys(
    replicas: int,
    asked: Mapping[int, ShuffleKey | None],
    begun: Mapping[int, ShuffleKey | None],
) -> dict[int, ShuffleKey | None]:
    """Return what each reader's order is drawn from: the same for all replicas of a split.

    ``asked`` has a key for each reader there is, ``begun`` those of readers that go on. Errors are
    those of `shared_key`.
    """
    if replicas == 1:
        return dict(asked)
    fellows: dict[int, list[int]] = {}
    for reader in sorted(asked):
        fellows.setdefault(reader // replicas, []).append(reader)
    keys: dict[int, ShuffleKey | None] = {}
    for split, readers in fellows.items():
        before = (begun[reader] for reader in readers if reader in begun)
        key = shared_key(split, before, [asked[reader] for reader in readers])
        keys.update(dict.fromkeys(readers, key))
    return keys


def sizes(key: ShuffleKey | None) -> str:
    """Say how rows are shuffled, in the words of who asks for it."""
    if key is None:
        return "local_shuffle_buffer_size=None"
    return f"local_shuffle_buffer_size={key.buffer_size} and batch_size={key.batch_size}"


class ShufflePlan:
    """Draw rows at random from a buffer that new rows are mixed into as it runs low.

    As long as more input may come, each batch is drawn from no fewer than ``buffer_size`` rows,
    all of them equally likely. All batches but the last have ``batch_size`` rows.

    Drawn rows are named by their place in the buffer's current generation: first the rows carried
    over from the generation before, then those added since, in order. Use it like this::

        while plan.wants_input:
            plan.add(rows)  # or plan.finish()
        if (carried := plan.refill()) is not None:
            ...  # a new generation, of these places of the last one and the rows added
        places = plan.draw()  # none if all is drawn
    """

    def __init__(self, buffer_size: int, batch_size: int, seed: int) -> None:
        """Start with an empty buffer; a ``buffer_size`` below ``batch_size`` is rounded up."""
        self._low = max(buffer_size, batch_size)
        self._high = self._low + self._low // 2
        self._batch_size = batch_size
        self._at_once = max(1, DRAW_ROWS // batch_size) * batch_size
        self._random = np.random.default_rng(seed)
        self._finished = False
        self._added = 0
        self._pool: Indices = np.empty(0, np.int64)
        self._in_order = True
        self._pending: Indices = self._pool
        self._carried_rows: Indices = self._pool
        self._first_new_row = 0
        self.places = 0
        """How many places the current generation has."""
        self.rows_in = 0
        """Rows of the input added so far."""

    def reseed(self, seed: int) -> None:
        """Draw by another seed; before anything is drawn."""
        self._random = np.random.default_rng(seed)

    @property
    def wants_input(self) -> bool:
        """Whether to call `add` or `finish` before the next `draw`."""
        if self._finished or len(self._pending):
            return False
        # New rows wait until there are enough of them for the work of mixing them in to pay.
        needed = self._high if len(self._pool) < self._low else self._low
        return len(self._pool) + self._added < needed

    def add(self, rows: int) -> None:
        """Take the next ``rows`` rows of the input."""
        self._added += rows
        self.rows_in += rows

    def finish(self) -> None:
        """Note that no more input comes: from now on the buffer runs empty."""
        self._finished = True

    def refill(self) -> Indices | None:
        """Mix in what was added; return the places carried over, ascending, or None if nothing was.

        The rows carried over take the first places of the new generation in that order.
        """
        if not self._added:
            return None
        carried = self._pool if self._in_order else np.sort(self._pool)
        self._in_order = True
        self._carried_rows = self.input_rows(carried)
        self._first_new_row = self.rows_in - self._added
        self.places = len(carried) + self._added
        self._pool = np.arange(self.places)
        self._added = 0
        return carried

    def draw(self) -> Indices:
        """Return places whose rows are the next batches, one after the other.

        Their number is a multiple of the batch size, but for the last draw; zero after that.
        """
        if len(self._pending):
            drawn, self._pending = self._pending, self._pending[:0]
            return drawn
        pool, have = self._pool, len(self._pool)
        if self._finished:
            count = min(have, self._at_once)
        else:
            batches = (have - self._low) // self._batch_size + 1
            count = min(batches * self._batch_size, self._at_once)
        chosen = self._random.choice(have, count, replace=False)
        drawn = pool.take(chosen)
        if have <= _SCAN_RATIO * count:
            left = np.ones(have, np.bool_)
            left[chosen] = False
            self._pool = pool.compress(left)
        else:
            # Too many to look at: close the gaps with what was not chosen of the last `count`.
            end = have - count
            stays = np.ones(count, np.bool_)
            stays[chosen.compress(chosen >= end) - end] = False
            pool[chosen.compress(chosen < end)] = pool[end:].compress(stays)
            self._pool = pool[:end]
            self._in_order = False
        return drawn

    @property
    def is_empty(self) -> bool:
        """Whether all rows added so far have been drawn."""
        return not (len(self._pool) or len(self._pending) or self._added)

    def input_rows(self, places: Indices) -> Indices:
        """Return the numbers, counted over the whole input, of the rows at these places."""
        carried = len(self._carried_rows)
        rows = places + (self._first_new_row - carried)
        old = places < carried
        rows[old] = self._carried_rows[places[old]]
        return rows

    def oldest_row(self) -> int:
        """Return the lowest number of a row in the current generation, drawn or not."""
        return int(self._carried_rows[0]) if len(self._carried_rows) else self._first_new_row

    def skip(self, rows: int) -> int:
        """Draw up to ``rows`` rows that nobody needs any more; return how many, zero at the end.

        In place of `draw`, it finds a position again without any data: what `draw` returns next
        is what it would have returned after so many rows.
        """
        drawn = self.draw()
        self._pending = drawn[rows:]
        return min(rows, len(drawn))

    def remaining(self) -> Indices:
        """Return the numbers, ascending, of the current generation's rows not drawn yet."""
        rows = self.input_rows(np.concatenate([self._pending, self._pool]))
        rows.sort()
        return rows
