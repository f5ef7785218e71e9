"""Which split gets the next block.

A router sees blocks as sizes and nodes, never as data, and decides from what it has seen alone:
with ``routing="rows"`` and no locality hints the same blocks in the same order are always
routed the same way, which is what makes a position in an epoch a few integers.
"""

from collections import deque
from collections.abc import Collection, Sequence
from heapq import heapreplace
from typing import NamedTuple


class Part(NamedTuple):
    """Rows ``start`` to ``stop`` of a block; whoever drops the last part lets the block go."""

    block: object
    start: int
    stop: int
    size_bytes: int
    node: str | None = None

    @property
    def rows(self) -> int:
        """How many rows this part has."""
        return self.stop - self.start

    def cut(self, rows: int) -> tuple["Part", "Part"]:
        """Cut off the first ``rows`` rows; bytes go along in proportion."""
        middle = self.start + rows
        size = self.size_bytes * rows // self.rows
        return (
            self._replace(stop=middle, size_bytes=size),
            self._replace(start=middle, size_bytes=self.size_bytes - size),
        )


class Assignment(NamedTuple):
    """A part and the split that gets it."""

    split: int
    part: Part


class RowsRouter:
    """Give the next part to the split with the fewest rows so far, as upstream does.

    Upstream: ``ray/data/_internal/execution/operators/output_splitter.py``. Blocks of a split
    whose consumer left are still routed to it (and dropped there): the other splits' shares must
    not depend on when somebody stopped reading.

    With ``hints`` (a node per split) up to two parts per split are held back, so that a split can
    be given one that lies on its node; a hungry split never waits for that.
    """

    def __init__(self, n: int, hints: Sequence[str] | None = None) -> None:
        """Start an epoch with ``n`` splits, none of which has rows."""
        self.rows = [0] * n
        self.unassigned_rows = 0
        self.unassigned_bytes = 0
        self.truncated_rows = 0
        self.locality_hits = 0
        self.locality_misses = 0
        self._hints = hints
        self._held: deque[Part] = deque()
        self._finished = False
        self._by_rows = [(0, split) for split in range(n)]

    def add(self, part: Part) -> None:
        """Take the next part of the dataset."""
        self._held.append(part)
        self.unassigned_rows += part.rows
        self.unassigned_bytes += part.size_bytes

    def finish(self) -> None:
        """Note that no more parts come: nothing is held back from now on."""
        self._finished = True

    def leave(self, split: int) -> None:
        """Note that a split takes no more; shares by rows do not depend on who is there."""

    def wanted_by(self, hungry: Collection[int]) -> Collection[int]:
        """Name the splits that the next part may go to."""
        return (self._fewest(),)

    def assign(
        self, hungry: Collection[int], full: Collection[int] = frozenset()
    ) -> list[Assignment]:
        """Decide what can be decided now.

        ``hungry`` are the splits that could use a part at once, ``full`` those that have enough:
        the others wait for them, because shares do not depend on timing.
        """
        hold = 2 * len(self.rows) if self._hints and not self._finished else 0
        out = []
        while self._held:
            split = self._fewest()
            if (split in full and not self._finished) or (
                len(self._held) <= hold and split not in hungry
            ):
                break
            out.append(self._give_fewest(self._pick(split)))
        return out

    def _fewest(self) -> int:
        return self._by_rows[0][1]

    def _give_fewest(self, index: int) -> Assignment:
        given = self._give(self._fewest(), index)
        heapreplace(self._by_rows, (self.rows[given.split], given.split))
        return given

    def _pick(self, split: int) -> int:
        """Choose a held part for a split: the first on its node, else the oldest."""
        if self._hints is None:
            return 0
        node = self._hints[split]
        return next((i for i, part in enumerate(self._held) if part.node == node), 0)

    def _give(self, split: int, index: int) -> Assignment:
        part = self._held[index]
        del self._held[index]
        if self._hints is not None:
            if part.node == self._hints[split]:
                self.locality_hits += 1
            else:
                self.locality_misses += 1
        self.rows[split] += part.rows
        self.unassigned_rows -= part.rows
        self.unassigned_bytes -= part.size_bytes
        return Assignment(split, part)


class EqualRouter(RowsRouter):
    """Route as `RowsRouter`, and end with exactly the same number of rows everywhere.

    A part is given away only while what stays behind can still level all splits with the one
    that would then be furthest ahead; at the end the rest is cut to level them, and what cannot
    be shared out (fewer rows than splits) is truncated.
    """

    def __init__(self, n: int, hints: Sequence[str] | None = None) -> None:
        """Start an epoch with ``n`` splits, none of which has rows."""
        super().__init__(n, hints)
        self._assigned_rows = 0
        self._most_rows = 0

    def assign(
        self, hungry: Collection[int], full: Collection[int] = frozenset()
    ) -> list[Assignment]:
        """Route what leaves enough to level the ends; at the end, level them."""
        out = []
        while self._held:
            split = self._fewest()
            index = self._pick(split)
            rows = self._held[index].rows
            most = max(self._most_rows, self.rows[split] + rows)
            to_level = most * len(self.rows) - self._assigned_rows - rows
            if self.unassigned_rows - rows < to_level or (split in full and not self._finished):
                break
            self._most_rows = most
            self._assigned_rows += rows
            out.append(self._give_fewest(index))
        return out + self._level() if self._finished else out

    def _level(self) -> list[Assignment]:
        out = []
        share = (sum(self.rows) + self.unassigned_rows) // len(self.rows)
        for split in range(len(self.rows)):
            while (missing := share - self.rows[split]) > 0:
                if self._held[0].rows > missing:
                    self._held.extendleft(reversed(self._held.popleft().cut(missing)))
                out.append(self._give(split, 0))
        self.truncated_rows += self.unassigned_rows
        self._held.clear()
        self.unassigned_rows = self.unassigned_bytes = 0
        return out


class DemandRouter(RowsRouter):
    """Give the next part to whoever is waiting, so that a slow consumer holds nobody up.

    Parts stay unassigned until a split is hungry, which is what keeps a slow consumer's share
    small.
    """

    def __init__(self, n: int, hints: Sequence[str] | None = None) -> None:
        """Start an epoch with ``n`` splits, none of which has rows."""
        super().__init__(n, hints)
        self._left: set[int] = set()

    def leave(self, split: int) -> None:
        """Give the split nothing more; when all have left, truncate what nobody wants."""
        self._left.add(split)
        if len(self._left) == len(self.rows):
            self.truncated_rows += self.unassigned_rows
            self._held.clear()
            self.unassigned_rows = self.unassigned_bytes = 0

    def wanted_by(self, hungry: Collection[int]) -> Collection[int]:
        """Name the hungry splits, those with the fewest rows first."""
        return sorted(set(hungry) - self._left, key=self.rows.__getitem__)

    def assign(
        self, hungry: Collection[int], full: Collection[int] = frozenset()
    ) -> list[Assignment]:
        """Give one part to each hungry split."""
        out = []
        for split in self.wanted_by(hungry):
            if not self._held:
                break
            out.append(self._give(split, self._pick(split)))
        return out


def make_router(
    n: int, *, equal: bool, routing: str, hints: Sequence[str] | None = None
) -> RowsRouter:
    """Return the router for one epoch of ``n`` splits."""
    if equal:
        return EqualRouter(n, hints)
    return (DemandRouter if routing == "demand" else RowsRouter)(n, hints)
