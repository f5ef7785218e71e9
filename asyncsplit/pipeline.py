"""Blocks in, batches out: no I/O, no waiting, no event loop.

A pipeline is fed with blocks and asked for batches by whoever drives it. Asking costs about a
microsecond per batch where columns are plain memory, because `asyncsplit.formats` has made one
array per column and block, and a batch is a dict of views.
"""

import secrets
from collections import deque
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
from ray.data.block import Block

from asyncsplit.core.shuffle import Indices, ShufflePlan
from asyncsplit.formats import (
    WINDOW_BYTES,
    Array,
    Run,
    Slab,
    are_alike,
    as_block,
    concat,
    cut,
    defragment,
    is_fragmented,
    resolve_batch_format,
    row_bytes,
    row_count,
    row_lists,
    take,
    to_batch,
    windows,
)

SMALL_BYTES = 4 * 2**20
"""Up to which size parts of a shuffle buffer are copied into one."""


class Pipeline:
    """Cut a sequence of blocks into batches.

    Call ``next(pipeline.batches)``: it returns a batch, or None if it needs more input, then
    `add` or `finish` and call again. After the last batch it raises StopIteration. What is
    handed out is not kept: a batch is freed when its user drops it, a block with its last batch.
    If a conversion fails, the error is raised once and StopIteration from then on.
    """

    def __init__(
        self,
        *,
        batch_size: int | None,
        batch_format: str | None,
        drop_last: bool = False,
        shuffle_buffer_size: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        """Start without input; arguments as those of ``ray.data.DataIterator.iter_batches``.

        Raises:
            ValueError: If the format is unknown, or rows are to be shuffled without a batch size.
        """
        self._format = resolve_batch_format(batch_format)
        self._size = batch_size
        self._drop_last = drop_last
        self.blocks: deque[Block] = deque()
        """Blocks added and not yet begun."""
        self.finished = False
        """Whether no more blocks come."""
        self._carry: list[tuple[Slab, int, int]] = []
        self._carried = 0
        self._whole_blocks = 0
        self.rows_in = 0
        """Rows of all blocks added."""
        self.rows_out = 0
        """Rows of all batches handed out."""
        self.rows_dropped = 0
        """Rows of the last batch, if it was dropped for not being full."""
        self.shuffle_seed: int | None = None
        """Seed of the shuffle, also if none was given; None if rows are not shuffled."""
        self._shuffle: _Shuffle | None = None
        if shuffle_buffer_size is not None:
            if batch_size is None:
                raise ValueError("Must specify a batch_size if using a local shuffle.")
            self.shuffle_seed = secrets.randbits(63) if shuffle_seed is None else shuffle_seed
            self._shuffle = _Shuffle(shuffle_buffer_size, batch_size, self.shuffle_seed)
        self.batches: Generator[Any, None, None] = self._run()
        """The batches, and None wherever input is missing."""

    def add(self, block: Any, start: int, stop: int) -> None:
        """Take rows `start` to `stop` of a block; calls are in the order of the rows.

        Raises:
            TypeError: If it is no block.
            ValueError: If the block has no such rows, or `finish` has been called.
        """
        if self.finished:
            raise ValueError("cannot add a block after finish()")
        block = as_block(block)
        rows = row_count(block)
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} are not within a block of {rows} rows")
        if self._shuffle is not None:
            self._shuffle.starts.append(self.rows_in)
        if start < stop:
            self.blocks.append(cut(block, start, stop))
            self.rows_in += stop - start

    def finish(self) -> None:
        """Note that no more blocks come."""
        self.finished = True

    def close(self) -> None:
        """Let go of all data; there are no batches any more."""
        self.blocks.clear()
        self._carry.clear()
        self.batches.close()

    @property
    def batches_out(self) -> int:
        """Batches handed out."""
        return -(-self.rows_out // self._size) if self._size else self._whole_blocks

    @property
    def rows_buffered(self) -> int:
        """Rows added and neither handed out nor dropped."""
        return self.rows_in - self.rows_out - self.rows_dropped

    @property
    def oldest_unfinished(self) -> int | None:
        """Which call of `add`, from 0, brought the oldest row that may be still to come.

        None if rows are not shuffled: then it follows from `rows_out`.
        """
        return None if self._shuffle is None else self._shuffle.oldest_unfinished()

    def _run(self) -> Generator[Any, None, None]:
        if self._size is None:
            return self._run_whole()
        return self._run_cut(self._size)

    def _run_whole(self) -> Generator[Any, None, None]:
        for block in self._in_order():
            if block is None:
                yield None
                continue
            rows = len(block)
            batch = [to_batch(block, self._format)]
            del block
            self.rows_out += rows
            self._whole_blocks += 1
            yield batch.pop()

    def _run_cut(self, size: int) -> Generator[Any, None, None]:
        # Whatever a name stands for here stays alive while a batch is out. So batches are yielded
        # without having had a name, and before the last one of a run the run is forgotten.
        blocks = self._in_order() if self._shuffle is None else self._shuffle.run(self)
        for block in blocks:
            if block is None:
                yield None
                continue
            runs = self._runs(Slab(block, self._format), size)
            del block
            while runs:
                columns, batches, number = runs.pop()
                stop = self.rows_out + size * number
                try:
                    for rows_out in range(self.rows_out + size, stop, size):
                        self.rows_out = rows_out
                        if columns is None:
                            yield next(batches)
                        else:
                            yield {name: next(values) for name, values in columns}
                except Exception:
                    self.rows_out -= size
                    raise
                if columns is None:
                    last = [next(batches)]
                else:
                    last = [{name: next(values) for name, values in columns}]
                del columns, batches
                self.rows_out = stop
                yield last.pop()
        if self._carry and self._drop_last:
            self.rows_dropped = self._carried
            self._carry.clear()
        elif self._carry:
            last = [Slab.join(self._carry)]
            self._carry.clear()
            self.rows_out += self._carried
            yield last.pop()
        if self._shuffle is not None:
            self._shuffle.finish()

    def _runs(self, slab: Slab, size: int) -> list[Run]:
        """Return the full batches that a block makes possible, the first of them last."""
        runs: list[Run] = []
        start = 0
        if self._carry:
            start = min(size - self._carried, slab.rows)
            self._carry.append((slab, 0, start))
            self._carried += start
            if self._carried < size:
                return runs
            runs.append(Run(None, iter([Slab.join(self._carry)]), 1))
            self._carry.clear()
        count, self._carried = divmod(slab.rows - start, size)
        if self._carried:
            self._carry.append((slab, slab.rows - self._carried, slab.rows))
        if count:
            runs.insert(0, slab.run(start, size, count))
        return runs

    def _in_order(self) -> Iterator[Block | None]:
        """Yield the blocks to cut batches from, and None while there is none."""
        while True:
            while self.blocks:
                if self._size is None:
                    yield self.blocks.popleft()
                else:
                    yield from windows(
                        self.blocks.popleft(), self._size, -self._carried % self._size
                    )
            if self.finished:
                return
            yield None


class RowPipeline(Pipeline):
    """Hand out single rows, as ``ray.data.DataIterator.iter_rows`` does: a batch is one dict."""

    def __init__(self) -> None:
        """Start without input."""
        super().__init__(batch_size=None, batch_format=None)

    @property
    def batches_out(self) -> int:
        """Rows handed out."""
        return self.rows_out

    def _run(self) -> Generator[Any, None, None]:
        for block in self._in_order():
            if block is None:
                yield None
                continue
            lists = row_lists(block)
            del block
            for rows in lists:
                rows.reverse()
                for rows_out in range(self.rows_out + 1, self.rows_out + len(rows) + 1):
                    self.rows_out = rows_out
                    yield rows.pop()


class _Shuffle:
    """The buffer that a `ShufflePlan` draws from, as parts of the blocks the rows came in.

    Rows carried over from one generation to the next stay where they are as long as they are
    most of a large block; small parts become one, so that drawing from them is cheap.
    """

    def __init__(self, buffer_size: int, batch_size: int, seed: int) -> None:
        self.starts: deque[int] = deque()
        self._oldest = 0
        self._plan = ShufflePlan(buffer_size, batch_size, seed)
        self._batch_size = batch_size
        self._parts: list[_Part] = []
        self._places = np.zeros(1, np.int64)

    def oldest_unfinished(self) -> int:
        """Return the number of the oldest entry of `starts` with rows in this generation."""
        while len(self.starts) > 1 and self.starts[1] <= self._plan.oldest_row():
            self.starts.popleft()
            self._oldest += 1
        return self._oldest

    def finish(self) -> None:
        """Note that all rows are finished with."""
        self._oldest += len(self.starts)
        self.starts.clear()

    def run(self, pipeline: Pipeline) -> Iterator[Block | None]:
        """Yield blocks of whole batches, only the last of which may be short, and None."""
        plan = self._plan
        added: list[Block] = []
        at_once = self._batch_size
        while True:
            while plan.wants_input:
                if pipeline.blocks:
                    added.append(pipeline.blocks.popleft())
                    plan.add(len(added[-1]))
                elif pipeline.finished:
                    plan.finish()
                else:
                    yield None
            if (carried := plan.refill()) is not None:
                self._mix(carried, added)
                added.clear()
                width = 1 + sum(part.bytes for part in self._parts) / self._places[-1]
                at_once = self._batch_size * max(1, int(WINDOW_BYTES / width / self._batch_size))
            places = plan.draw()
            if not len(places):
                return
            for first in range(0, len(places), at_once):
                block = [self._take(places[first : first + at_once])]
                if plan.is_empty and first + at_once >= len(places):
                    self._parts.clear()
                yield block.pop()

    def _mix(self, carried: Indices, added: list[Block]) -> None:
        ends = np.searchsorted(carried, self._places[1:-1])
        parts = [
            part.only(places - begin)
            for part, begin, places in zip(
                self._parts, self._places, np.split(carried, ends), strict=False
            )
            if len(places)
        ]
        for group in _small_groups([_Part(_Source(block)) for block in added]):
            blocks = [part.source.block for part in group]
            whole = concat(blocks) if len(blocks) > 1 else blocks[0]
            parts.extend(_Part(_Source(piece)) for piece in _in_single_chunks(whole))
        self._parts = [_settled(group) for group in _small_groups(parts)]
        self._places = np.cumsum([0] + [part.size for part in self._parts])

    def _take(self, places: Indices) -> Block:
        if len(self._parts) == 1:
            return _gather([self._parts[0].only(places)])
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
