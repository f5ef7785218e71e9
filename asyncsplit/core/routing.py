"""Which split gets the next block.

A router sees blocks as sizes and nodes, never as data, and decides from what it has seen alone:
with ``routing="rows"`` and no locality hints the same blocks in the same order are always
routed the same way, which is what makes a position in an epoch a few integers.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from heapq import heapreplace
from math import inf
from typing import Literal, NamedTuple, TypeAlias

from asyncsplit.core.pace import Paces

Equal: TypeAlias = bool | Literal["pad"]


class Part(NamedTuple):
    """Rows ``start`` to ``stop`` of a block; whoever drops the last part lets the block go."""

    block: object
    start: int
    stop: int
    size_bytes: int
    node: str | None = None
    padding: bool = False
    """Whether its rows repeat rows of another part, to make shares equal."""

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
        self.padded_rows = 0
        """Rows given a second time, to make shares equal."""
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

    @property
    def complete(self) -> bool:
        """Whether all there is to be given has been given."""
        return self._finished and not self.unassigned_rows

    def wanted_by(self, hungry: Collection[int]) -> Collection[int]:
        """Name the splits that the next part may go to."""
        return (self._fewest(),)

    def may_get_more(self, split: int) -> bool:
        """Tell whether the split may be given another part."""
        return not self.complete

    def go_on_from(self, earlier: "RowsRouter") -> None:
        """Remember how fast consumers were in an earlier epoch; shares by rows ignore it."""

    def ask(
        self, split: int, reader: int, rows_ahead: int, rows: int, busy_s: float, now: float
    ) -> None:
        """Note what a split's reader has ahead, and how fast it is; shares by rows ignore it."""

    def credit(self, room: int, hungry: Collection[int], full: Collection[int]) -> int:
        """Return how many bytes may be taken from the dataset; 1 stands for one part.

        ``room`` is how many more may wait for the split for which most do.
        """
        return 0 if set(self.wanted_by(hungry)) <= set(full) else max(1, room)

    def held_until(self, split: int) -> float:
        """Return until when the split is given nothing because it needs nothing."""
        return -inf

    def route_at(self, hungry: Collection[int]) -> float | None:
        """Return when `assign` may decide otherwise though nothing has happened."""
        return None

    def assign(
        self, hungry: Collection[int], full: Collection[int] = frozenset(), now: float = 0.0
    ) -> Iterator[Assignment]:
        """Decide what can be decided now, part by part.

        ``hungry`` are the splits that could use a part at once, ``full`` those that have enough:
        the others wait for them, because shares do not depend on timing. Both are looked at anew
        for each part.
        """
        while self._held:
            split = self._fewest()
            hold = 2 * len(self.rows) if self._hints and not self._finished else 0
            if split in full or (len(self._held) <= hold and split not in hungry):
                return
            yield self._to_fewest(self._give(split, self._pick(split)))

    def _fewest(self) -> int:
        return self._by_rows[0][1]

    def _to_fewest(self, given: Assignment) -> Assignment:
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
        self.rows[split] += part.rows
        self.unassigned_rows -= part.rows
        self.unassigned_bytes -= part.size_bytes
        return Assignment(split, part)

    def _truncate(self) -> None:
        self.truncated_rows += self.unassigned_rows
        self._held.clear()
        self.unassigned_rows = self.unassigned_bytes = 0


class EqualRouter(RowsRouter):
    """Route as `RowsRouter`, and end with exactly the same number of rows everywhere.

    No split gets more than its share of the rows seen so far. So a part that is too large for that
    waits for more rows to come, or is cut when there are no more; what cannot be shared out (fewer
    rows than splits) is truncated.
    """

    def __init__(self, n: int, hints: Sequence[str] | None = None) -> None:
        """Start an epoch with ``n`` splits, none of which has rows."""
        super().__init__(n, hints)
        self._seen_rows = 0

    def add(self, part: Part) -> None:
        """Take the next part of the dataset."""
        super().add(part)
        self._seen_rows += part.rows

    def may_get_more(self, split: int) -> bool:
        """Tell whether the split may be given another part."""
        return super().may_get_more(split) and not (self._finished and not self._room(split))

    def assign(
        self, hungry: Collection[int], full: Collection[int] = frozenset(), now: float = 0.0
    ) -> Iterator[Assignment]:
        """Route what no share is too small for; in the end, cut what is left to level the ends."""
        while self._held:
            split = self._fewest()
            if split in full:
                return
            index = self._pick(split)
            room = self._room(split)
            if self._held[index].rows > room:
                if not self._finished:
                    return
                if not room:
                    self._truncate()
                    return
                self._held[index], rest = self._held[index].cut(room)
                self._held.insert(index + 1, rest)
            yield self._to_fewest(self._give(split, index))

    def _room(self, split: int) -> int:
        return self._seen_rows // len(self.rows) - self.rows[split]


class PaddedRouter(EqualRouter):
    """Route as `EqualRouter`, but give every row to somebody, and some of the last ones twice.

    In the end splits that are short of the others' rows get the dataset's last rows once more, as
    many as are missing in all (fewer than there are splits), one split after the other. The blocks
    these rows are in are kept until then.
    """

    def __init__(self, n: int, hints: Sequence[str] | None = None) -> None:
        """Start an epoch with ``n`` splits, none of which has rows."""
        super().__init__(n, hints)
        self._last: deque[Part] = deque()
        self._last_rows = 0

    def add(self, part: Part) -> None:
        """Take the next part of the dataset."""
        super().add(part)
        self._last.append(part._replace(padding=True))
        self._last_rows += part.rows
        self._keep(len(self.rows) - 1)

    def finish(self) -> None:
        """Note that no more parts come, so that it is known how many rows will be missing."""
        super().finish()
        self._keep(-self._seen_rows % len(self.rows))

    @property
    def complete(self) -> bool:
        """Whether all there is to be given has been given, so that all have the same."""
        return super().complete and not self._room(self._fewest())

    def assign(
        self, hungry: Collection[int], full: Collection[int] = frozenset(), now: float = 0.0
    ) -> Iterator[Assignment]:
        """Route what no share is too small for; in the end, fill up those who are short."""
        yield from super().assign(hungry, full)
        while super().complete and not self.complete:
            split = self._fewest()
            if split in full:
                return
            yield self._to_fewest(self._pad(split))
        if self.complete:
            self._last.clear()

    def _room(self, split: int) -> int:
        up = len(self.rows) - 1 if self._finished else 0
        return (self._seen_rows + up) // len(self.rows) - self.rows[split]

    def _keep(self, rows: int) -> None:
        """Let go of all but the last rows."""
        while self._last_rows > rows:
            first = self._last.popleft()
            surplus = min(self._last_rows - rows, first.rows)
            if surplus < first.rows:
                self._last.appendleft(first.cut(surplus)[1])
            self._last_rows -= surplus

    def _pad(self, split: int) -> Assignment:
        """Give a split what it is short of, or some of it; what is repeated goes to the end."""
        part, room = self._last.popleft(), self._room(split)
        if part.rows > room:
            part, rest = part.cut(room)
            self._last.appendleft(rest)
        self._last.append(part)
        self.rows[split] += part.rows
        self.padded_rows += part.rows
        return Assignment(split, part)


class DemandRouter(RowsRouter):
    """Give the next part to whoever needs it, so that a slow consumer holds nobody up.

    Parts stay unassigned until a split is hungry and about to run out, as `Paces` knows. That is
    what keeps a slow consumer's share small.
    """

    def __init__(self, n: int, hints: Sequence[str] | None = None) -> None:
        """Start an epoch with ``n`` splits, of whose consumers nothing is known."""
        super().__init__(n, hints)
        self._left: set[int] = set()
        self._paces = Paces(n)

    def go_on_from(self, earlier: RowsRouter) -> None:
        """Expect consumers to be as fast as they were in an earlier epoch."""
        assert isinstance(earlier, DemandRouter)
        self._paces = Paces(len(self.rows), earlier._paces)

    def ask(
        self, split: int, reader: int, rows_ahead: int, rows: int, busy_s: float, now: float
    ) -> None:
        """Note how much a split's reader has ahead, and how fast it is: see `Pace.ask`."""
        self._paces.ask(split, reader, rows_ahead, rows, busy_s, now)

    def leave(self, split: int) -> None:
        """Give the split nothing more; when all have left, truncate what nobody wants."""
        self._left.add(split)
        self._paces.leave(split)
        if len(self._left) == len(self.rows):
            self._truncate()

    def wanted_by(self, hungry: Collection[int]) -> Collection[int]:
        """Name the hungry splits, those with the fewest rows first."""
        return sorted(set(hungry) - self._left, key=self.rows.__getitem__)

    def credit(self, room: int, hungry: Collection[int], full: Collection[int]) -> int:
        """Keep as much unassigned as may wait for one split, to see the end coming."""
        return max(0 if self._held else 1, room - self.unassigned_bytes)

    def held_until(self, split: int) -> float:
        """Return until when the split is given nothing, because it needs nothing."""
        return self._paces.look_at(split)

    def route_at(self, hungry: Collection[int]) -> float | None:
        """Return when the first part is due that is kept from one of the hungry splits."""
        return min(map(self._paces.look_at, hungry), default=None) if self._held else None

    def assign(
        self, hungry: Collection[int], full: Collection[int] = frozenset(), now: float = 0.0
    ) -> Iterator[Assignment]:
        """Give a part to each hungry split that is due, then as many as will last for a while."""
        due = []
        for split in self.wanted_by(hungry):
            if not self._held:
                return
            index = self._pick(split)
            rest = self.unassigned_rows
            if self._paces.is_due(split, self._held[index].rows, rest, now, is_all=self._finished):
                due.append(split)
                yield self._take(split, index, now)
        for split in due:
            while (
                self._held
                and split not in full
                and self._paces.wants_more(split, self.unassigned_rows, now)
            ):
                yield self._take(split, self._pick(split), now)

    def _take(self, split: int, index: int, now: float) -> Assignment:
        given = self._give(split, index)
        self._paces.take(split, given.part.rows, now)
        return given


def make_router(
    n: int, *, equal: Equal, routing: str, hints: Sequence[str] | None = None
) -> RowsRouter:
    """Return the router for one epoch of ``n`` splits."""
    if equal:
        return (PaddedRouter if equal == "pad" else EqualRouter)(n, hints)
    return (DemandRouter if routing == "demand" else RowsRouter)(n, hints)
