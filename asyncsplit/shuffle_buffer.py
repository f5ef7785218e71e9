"""The buffer of a local shuffle: the data that a `ShufflePlan` draws from.

Like `asyncsplit.pipeline`, whose input it takes and whose batches it draws, it never waits.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
from ray.data.block import Block

from asyncsplit.core.shuffle import Indices, ShuffleKey, ShufflePlan
from asyncsplit.formats import (
    WINDOW_BYTES,
    Array,
    are_alike,
    concat,
    defragment,
    is_fragmented,
    row_bytes,
    take,
)

SMALL_BYTES = 4 * 2**20
"""Up to which size parts of a shuffle buffer are copied into one."""


class Input(Protocol):
    """What a shuffle buffer is filled from."""

    blocks: deque[Block]
    """Blocks added and not yet begun."""
    finished: bool
    """Whether no more blocks come."""


class ShuffleBuffer:
    """The buffer that a `ShufflePlan` draws from, as parts of the blocks the rows came in.

    Rows carried over from one generation to the next stay where they are as long as they are
    most of a large block; small parts become one, so that drawing from them is cheap.
    """

    def __init__(self, key: ShuffleKey) -> None:
        """Start empty."""
        self._plan = ShufflePlan(*key)
        self._batch_size = key.batch_size
        self._starts: deque[int] = deque()
        self._oldest = 0
        self._next_row = 0
        self._skipped = 0
        self._delivered = 0
        self._to_replay = 0
        self._padding_from: int | None = None
        self._drawn = 0
        self.padding: list[int] = []
        """Places, in the order drawn since, of the rows that repeat others."""
        self._parts: list[_Part] = []
        # Where each part begins, and the end. Before the first are places of rows without data.
        self._places = np.zeros(1, np.int64)

    @property
    def has_input(self) -> bool:
        """Whether it has been told of any input."""
        return bool(self._starts or self._delivered)

    def expect(self, rows: int, *, padding: bool = False) -> None:
        """Note that the input's next block has so many rows; from padding on, all repeat others."""
        if padding and self._padding_from is None:
            self._padding_from = self._next_row
        self._starts.append(self._next_row)
        self._next_row += rows

    def oldest_unfinished(self) -> int:
        """Return the number of the oldest expected block with rows in this generation."""
        while len(self._starts) > 1 and self._starts[1] <= self._plan.oldest_row():
            self._starts.popleft()
            self._oldest += 1
        return self._oldest

    def finish(self) -> None:
        """Note that all rows are finished with."""
        self._oldest += len(self._starts)
        self._starts.clear()
        self._parts.clear()

    def resume(self, skipped: Sequence[int], delivered: int, seed: int) -> None:
        """Leave out what was delivered; of the skipped blocks there are row counts only."""
        self._plan.reseed(seed)
        self._skipped = self._next_row = sum(skipped)
        self._delivered = self._to_replay = delivered
        counts = iter(skipped)
        while self._to_replay:
            while self._plan.wants_input:
                if (rows := next(counts, None)) is None:
                    return
                self._plan.add(rows)
            self._plan.refill()
            self._replay()

    def _replay(self) -> None:
        """Skip those of the rows delivered that can be drawn now."""
        plan, delivered = self._plan, self._delivered
        if not (replayed := plan.skip(self._to_replay)):
            raise ValueError(
                f"cannot resume after {delivered} rows of an input of {plan.rows_in}:"
                " give the input that the earlier pipeline was given"
            )
        self._to_replay -= replayed
        if self._to_replay or not len(remaining := plan.remaining()):
            return
        if remaining[0] < self._skipped:
            raise ValueError(
                f"row {remaining[0]} is not among the first {delivered} to be delivered, but its"
                " block is skipped: skip only blocks of which every row was delivered"
            )
        if delivered % self._batch_size:
            raise ValueError(
                f"cannot resume after {delivered} rows: all batches but the last have"
                f" {self._batch_size}, and the input goes on"
            )

    def run(self, source: Input) -> Iterator[Block | None]:
        """Yield blocks of whole batches, only the last of which may be short, and None."""
        plan = self._plan
        added: list[Block] = []
        at_once = self._batch_size
        while True:
            while plan.wants_input:
                if source.blocks:
                    added.append(source.blocks.popleft())
                    plan.add(len(added[-1]))
                elif source.finished:
                    plan.finish()
                else:
                    yield None
            if (carried := plan.refill()) is not None:
                self._mix(carried, added)
                added.clear()
                rows = max(1, self._places[-1] - self._places[0])
                width = 1 + sum(part.bytes for part in self._parts) / rows
                at_once = self._batch_size * max(1, int(WINDOW_BYTES / width / self._batch_size))
            if self._to_replay:
                self._replay()
                continue
            places = plan.draw()
            if not len(places):
                return
            if self._padding_from is not None:
                repeated = plan.input_rows(places) >= self._padding_from
                self.padding.extend((np.flatnonzero(repeated) + self._drawn).tolist())
            self._drawn += len(places)
            for first in range(0, len(places), at_once):
                block = [self._take(places[first : first + at_once])]
                if plan.is_empty and first + at_once >= len(places):
                    self._parts.clear()
                yield block.pop()

    def _mix(self, carried: Indices, added: list[Block]) -> None:
        starts = np.searchsorted(carried, self._places[:-1])
        parts = [
            part.only(places - begin)
            for part, begin, places in zip(
                self._parts, self._places, np.split(carried, starts)[1:], strict=False
            )
            if len(places)
        ]
        for group in _small_groups([_Part(_Source(block)) for block in added]):
            blocks = [part.source.block for part in group]
            whole = concat(blocks) if len(blocks) > 1 else blocks[0]
            parts.extend(_Part(_Source(piece)) for piece in _in_single_chunks(whole))
        self._parts = [_settled(group) for group in _small_groups(parts)]
        sizes = [part.size for part in self._parts]
        self._places = np.cumsum([self._plan.places - sum(sizes), *sizes])

    def _take(self, places: Indices) -> Block:
        if len(self._parts) == 1:
            return _gather([self._parts[0].only(places - self._places[0])])
        where = np.searchsorted(self._places, places, side="right") - 1
        # Sorting 16 bits is a radix sort.
        order = np.argsort(where.astype(np.uint16), kind="stable")
        ends = np.searchsorted(where[order], np.arange(1, len(self._parts)))
        parts = [
            part.only(local - begin)
            for part, begin, local in zip(
                self._parts, self._places, np.split(places[order], ends), strict=False
            )
            if len(local)
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return _gather([_Part(_Source(_gather(parts)), back)])


class _Source:
    """A block and what is worked out about it once."""

    def __init__(self, block: Block) -> None:
        self.block = block

    @cached_property
    def row_bytes(self) -> float:
        return row_bytes(self.block)

    @cached_property
    def columns(self) -> list[Array | None]:
        """The values of each Arrow column as bits, or None if they are not plain memory."""
        chunks = self.block.to_batches()
        return [_bits(column) if len(chunks) == 1 else None for column in chunks[0].columns]


class _Part(NamedTuple):
    """Rows of a block: those at the indices ``rows``, or all."""

    source: _Source
    rows: Indices | None = None

    @property
    def size(self) -> int:
        return len(self.source.block) if self.rows is None else len(self.rows)

    @property
    def bytes(self) -> float:
        return self.size * self.source.row_bytes

    def only(self, rows: Indices) -> "_Part":
        """Return the part with these of its rows."""
        return _Part(self.source, rows if self.rows is None else self.rows.take(rows))

    def values(self, index: int) -> Array | None:
        """Return the bits of a column of plain memory, else None."""
        values = self.source.columns[index]
        return values if values is None or self.rows is None else values.take(self.rows)

    def taken(self, columns: list[int] | None = None) -> Block:
        """Return the rows as a block, or some columns of an Arrow block."""
        block: Any = self.source.block
        if columns is not None:
            block = block.select(columns)
        return cast("Block", block) if self.rows is None else take(block, self.rows)


def _small_groups(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Yield parts in groups of together no more than `SMALL_BYTES`; a larger one is alone."""
    group: list[_Part] = []
    size = 0.0
    for part in parts:
        size += part.bytes
        if group and size > SMALL_BYTES:
            yield group
            group, size = [], part.bytes
        group.append(part)
    if group:
        yield group


def _in_single_chunks(block: Block) -> list[Block]:
    """Return blocks with the same rows whose columns have one chunk each."""
    if not is_fragmented(block):
        return [block]
    chunks = max(column.num_chunks for column in block.itercolumns())
    if row_bytes(block) * len(block) < chunks * WINDOW_BYTES:
        return [defragment(block)]
    return [pa.Table.from_batches([chunk]) for chunk in block.to_batches()]


def _settled(group: list[_Part]) -> _Part:
    """Return a group as one part; a single one is copied once most of its block is gone."""
    part = group[0]
    if len(group) == 1 and part.size * 2 >= len(part.source.block):
        return part
    return _Part(_Source(_gather(group)))


def _gather(parts: list[_Part]) -> Block:
    """Return one block of the rows of all parts, Arrow columns in one chunk each."""
    if not are_alike([part.source.block for part in parts]):
        return defragment(concat([part.taken() for part in parts]))
    schema = parts[0].source.block.schema
    columns: dict[int, pa.Array | pa.ChunkedArray] = dict.fromkeys(range(len(schema)))
    for index in columns:
        values = [bits for part in parts if (bits := part.values(index)) is not None]
        if len(values) == len(parts):
            joined = values[0] if len(values) == 1 else np.concatenate(values)
            buffers = [None, pa.py_buffer(joined)]
            columns[index] = pa.Array.from_buffers(schema.field(index).type, len(joined), buffers)
    if others := [index for index, column in columns.items() if column is None]:
        rest = defragment(concat([part.taken(others) for part in parts]))
        columns.update(zip(others, rest.columns, strict=True))
    return pa.Table.from_arrays(list(columns.values()), schema=schema)


def _bits(array: pa.Array) -> Array | None:
    kind = array.type
    if array.null_count or not pa.types.is_primitive(kind) or kind.bit_width not in (8, 16, 32, 64):
        return None
    values = np.frombuffer(array.buffers()[1], f"u{kind.bit_width // 8}")
    return values[array.offset : array.offset + len(array)]
