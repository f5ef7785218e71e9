"""Blocks and parts of blocks in the format a training loop asks for.

The outcome is what ``ray.data.DataIterator.iter_batches`` yields for the same rows. Only the way
there is shorter: where Arrow or pandas hold a column as plain memory, it becomes one array per
block, and batches are views of it. Everything else goes through Ray's `BlockAccessor`, batch by
batch, because dtypes depend on whether there are nulls among the rows of a batch.

Upstream: ``ray/data/_internal/batcher.py``, ``arrow_block.py``, ``pandas_block.py``.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, cast, overload

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from ray.data.block import Block, BlockAccessor, DataBatch
from ray.data.extensions import (
    ArrowVariableShapedTensorType,
    TensorDtype,
    get_arrow_extension_tensor_types,
)

from asyncsplit import engine
from asyncsplit.plain import PlainBlock

SUPPORTED_FORMATS = ("default", "numpy", "pandas", "pyarrow", "cudf", None)
"""Values of ``batch_format``; "default" means "numpy", None the block as it is."""

WINDOW_BYTES = 2**20
"""How much is copied in one go where copying cannot be avoided: well below a millisecond."""

WINDOW_CELLS = 4096
"""How many values are turned into Python objects in one go: a millisecond or two."""

Array = NDArray[Any]

AnyBlock = Block | PlainBlock
"""A block to make batches of: where these are numpy's, it may be plain."""

Columns = dict[str, Array | pa.Array | None]
"""A block's columns by name.

An ndarray where each of its slices is what upstream makes of that slice; an Arrow array where
each slice has to be converted by itself; None where only Ray's `BlockAccessor` knows how.
"""


def resolve_batch_format(name: str | None) -> str | None:
    """Return the batch format that `name` stands for.

    Raises:
        ValueError: If there is no such format, or it needs a package that is not installed.
    """
    if name not in SUPPORTED_FORMATS:
        raise ValueError(f"batch_format={name!r} is unknown: use one of {SUPPORTED_FORMATS}")
    if name == "cudf" and find_spec("cudf") is None:
        raise ValueError(
            "batch_format='cudf' needs the package cudf, which is not installed:"
            " install it or use another format, such as 'pyarrow'"
        )
    return "numpy" if name == "default" else name


def as_block(block: Any) -> AnyBlock:
    """Return a block of any kind as a table or a data frame.

    Raises:
        TypeError: If it is no kind of block.
    """
    if isinstance(block, pa.Table | pd.DataFrame | PlainBlock):
        return block
    if isinstance(block, pa.RecordBatch):
        return pa.Table.from_batches([block])
    return cast("Block", BlockAccessor.for_block(block).to_block())


def row_count(block: Any) -> int:
    """Return how many rows a block has; as upstream, none if an Arrow block has no columns."""
    if isinstance(block, pa.Table) and not block.num_columns:
        return 0
    return len(block)


@overload
def cut(block: Block, start: int, stop: int) -> Block: ...
@overload
def cut(block: AnyBlock, start: int, stop: int) -> AnyBlock: ...
def cut(block: AnyBlock, start: int, stop: int) -> AnyBlock:
    """Return rows `start` to `stop` without copying; the block itself if those are all."""
    if start == 0 and stop == len(block):
        return block
    if isinstance(block, PlainBlock):
        return block.slice(start, stop)
    if isinstance(block, pa.Table):
        return block.slice(start, stop - start)
    return _renumbered(block.iloc[start:stop])


def take(block: Block, rows: Array) -> Block:
    """Return a copy of the rows at these indices."""
    if isinstance(block, pd.DataFrame):
        return _renumbered(block.take(rows))
    return BlockAccessor.for_block(block).take(cast("list[int]", rows))


def _renumbered(frame: Any) -> Block:
    # As Ray's accessor does, in a way that pandas has not deprecated.
    frame.index = pd.RangeIndex(len(frame))
    return cast("Block", frame)


def are_alike(blocks: Sequence[Any]) -> bool:
    """Tell whether all blocks are Arrow tables with the same columns."""
    first: Any = blocks[0]
    return all(
        isinstance(block, pa.Table) and (block is first or block.schema.equals(first.schema))
        for block in blocks
    )


def concat(blocks: Sequence[AnyBlock]) -> Block:
    """Return one block with the rows of all.

    Upstream refuses to mix Arrow and pandas blocks in a batch. Here they become Arrow.
    """
    blocks = [block.to_table() if isinstance(block, PlainBlock) else block for block in blocks]
    if len({type(block) for block in blocks}) > 1:
        blocks = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
    if are_alike(blocks):
        return pa.concat_tables(blocks)
    return cast("Block", engine.concat_blocks(blocks))


def to_batch(block: Block, batch_format: str | None) -> DataBatch:
    """Return a whole block as one batch."""
    return BlockAccessor.for_block(block).to_batch_format(batch_format)


def is_fragmented(block: Block) -> bool:
    """Tell whether an Arrow block has columns in several chunks."""
    return isinstance(block, pa.Table) and any(
        column.num_chunks != 1 for column in block.itercolumns()
    )


def defragment(block: AnyBlock) -> AnyBlock:
    """Return a block with one chunk per column, copied only if there were more."""
    if isinstance(block, PlainBlock) or not is_fragmented(block):
        return block
    if any(isinstance(kind, pa.BaseExtensionType) for kind in block.schema.types):
        return cast("Block", BlockAccessor.for_block(block).slice(0, len(block), copy=True))
    return block.combine_chunks()


def row_bytes(block: Block) -> float:
    """Return how many bytes a row has: at most, if the block is part of a larger one."""
    if isinstance(block, pa.Table):
        return float(block.get_total_buffer_size() / len(block))
    return float(block.memory_usage(index=False).sum() / len(block))


def windows(block: AnyBlock, rows: int, first: int) -> Iterator[AnyBlock]:
    """Yield a block in pieces that have one chunk per column, and let go of it with the last.

    Chunks are joined a window at a time: joining those of a large block at once takes long.

    Args:
        block: The block.
        rows: All pieces but the first and the last have a multiple of this number of rows.
        first: All pieces but the last end at a multiple of `rows` after so many rows.
    """
    start = 0
    if not isinstance(block, PlainBlock) and is_fragmented(block):
        if any(pa.types.is_dictionary(kind) for kind in block.schema.types):
            # Categories of a batch are those of the whole block.
            block = block.unify_dictionaries()
        step = rows * max(1, int(WINDOW_BYTES / (1 + row_bytes(block)) / rows))
        for stop in range(first + step, len(block), step):
            yield defragment(cut(block, start, stop))
            start = stop
    last = [defragment(cut(block, start, len(block)))]
    del block
    yield last.pop()


class Run(NamedTuple):
    """Batches of equal size from one block, not yet made.

    The next batch takes the next value of each of the named ``columns``, if there are any, or is
    the next of ``batches``. A run holds no more of the block than these batches need, and nothing
    of what it has yielded.
    """

    columns: list[tuple[str, Iterator[Any]]] | None
    batches: Iterator[DataBatch]
    number: int


class Slab:
    """A block made ready for cutting batches of one format out of it."""

    __slots__ = ("_columns", "_format", "block", "rows")

    def __init__(self, block: AnyBlock, batch_format: str | None) -> None:
        """Take a block with one chunk per column."""
        self.block = block
        self.rows = len(block)
        self._format = batch_format
        self._columns = _columns(block) if batch_format == "numpy" else None

    def batch(self, start: int, stop: int) -> DataBatch:
        """Return rows `start` to `stop` as one batch."""
        if self._columns is not None:
            return {name: next(values) for name, values in self._cut(start, stop - start, 1)}
        block = cast("Block", cut(self.block, start, stop))
        if isinstance(block, pa.Table):
            return block if self._format in ("pyarrow", None) else to_batch(block, self._format)
        # Upstream gives columns of arrays their tensor type while it builds a batch.
        return to_batch(concat([block]), self._format)

    def run(self, start: int, size: int, count: int) -> Run:
        """Return `count` batches of `size` rows, to be made one by one."""
        if self._columns is not None:
            return Run(self._cut(start, size, count), iter(()), count)
        rows = range(start, start + size * count, size)
        frame = _arrow_backed(self.block) if self._format == "pandas" and count > 1 else None
        if frame is not None:
            return Run(None, (_renumbered(frame.iloc[row : row + size]) for row in rows), count)
        return Run(None, (self.batch(row, row + size) for row in rows), count)

    def _cut(self, start: int, size: int, count: int) -> list[tuple[str, Iterator[Any]]]:
        stop = start + size * count
        rows = range(start, stop, size)
        columns: list[tuple[str, Iterator[Any]]] = []
        for name, column in cast("Columns", self._columns).items():
            if isinstance(column, np.ndarray):
                values = iter(column[start:stop].reshape(count, size, *column.shape[1:]))
            elif column is not None:
                values = _converted(column, rows)
            else:
                values = _converted_by_ray(self.block, name, rows)
            columns.append((name, values))
        return columns

    def _is_like(self, other: "Slab") -> bool:
        if isinstance(self.block, PlainBlock) and isinstance(other.block, PlainBlock):
            return self.block.is_like(other.block)
        if isinstance(self.block, pd.DataFrame) and isinstance(other.block, pd.DataFrame):
            return bool(self.block.dtypes.equals(other.block.dtypes))
        return are_alike([self.block, other.block])

    @staticmethod
    def join(pieces: "Sequence[tuple[Slab, int, int]]") -> DataBatch:
        """Return one batch of the rows of all pieces, each a slab with a start and a stop."""
        first = pieces[0][0]
        if len(pieces) == 1:
            return first.batch(*pieces[0][1:])
        if first._columns is None or not all(first._is_like(slab) for slab, _, _ in pieces):
            blocks = [cut(slab.block, *rows) for slab, *rows in pieces]
            return to_batch(concat(blocks), first._format)
        batch: dict[str, Any] = dict.fromkeys(first._columns)
        writeable = _PANDAS_IS_WRITEABLE and isinstance(first.block, pd.DataFrame)
        for name in batch:
            arrays = [
                column[start:stop]
                for slab, start, stop in pieces
                if isinstance(column := cast("Columns", slab._columns)[name], np.ndarray)
                and column.ndim == 1
            ]
            if len(arrays) == len(pieces):
                batch[name] = joined = np.concatenate(arrays)
                joined.flags.writeable = writeable
        if rest := [name for name, values in batch.items() if values is None]:
            blocks = [_select(cut(slab.block, *rows), rest) for slab, *rows in pieces]
            batch.update(BlockAccessor.for_block(concat(blocks)).to_numpy(rest))
        return batch


def block_rows(block: Any) -> Iterator[dict[str, Any]]:
    """Yield a block's rows as dicts of Python objects, as ``DataIterator.iter_rows`` does."""
    for rows in row_lists(as_block(block)):
        yield from rows


def row_lists(block: Block) -> Iterator[list[dict[str, Any]]]:
    """Yield a block's rows a few at a time, and let go of it with the last of them."""
    block = BlockAccessor.batch_to_block(block)
    step = max(1, WINDOW_CELLS // max(1, len(block.columns)))
    start = 0
    for stop in range(step, len(block), step):
        yield _rows(block, start, stop)
        start = stop
    last = _rows(block, start, len(block))
    del block
    yield last


def _rows(block: Block, start: int, stop: int) -> list[dict[str, Any]]:
    return list(BlockAccessor.for_block(cut(block, start, stop)).iter_rows(True))


_PANDAS_IS_WRITEABLE = pd.Series([0]).to_numpy().flags.writeable
"""Whether an array taken from pandas may be written to: before pandas 3."""

_FIXED_SHAPE_TENSORS = tuple(
    kind for kind in get_arrow_extension_tensor_types() if kind is not ArrowVariableShapedTensorType
)


def _columns(block: AnyBlock) -> Columns | None:
    """Return the columns by name; None if a name is used twice, so that Ray says what happens."""
    if isinstance(block, PlainBlock):
        return cast("Columns", block.columns)
    names = block.columns if isinstance(block, pd.DataFrame) else block.schema.names
    if len(set(names)) < len(names):
        return None
    if isinstance(block, pd.DataFrame):
        return {name: _series_memory(block[name]) for name in names}
    chunks = block.to_batches()
    if len(chunks) > 1:
        # More than Arrow can put into one chunk: a batch with gigabytes of strings.
        return dict.fromkeys(names)
    return {
        name: _arrow_memory(block, name, column)
        for name, column in zip(names, chunks[0].columns, strict=True)
    }


def _arrow_backed(block: AnyBlock) -> Any:
    """Return an Arrow block as a data frame if each slice of that is what upstream makes of it.

    So it is where pandas keeps all columns as Arrow does: a dtype follows from the type alone, and
    no batch holds more memory than one that was converted by itself.
    """
    if _PANDAS_IS_WRITEABLE or not isinstance(block, pa.Table):
        return None
    empty: Any = to_batch(block.slice(0, 0), "pandas")
    if not all(isinstance(dtype, pd.ArrowDtype) for dtype in empty.dtypes):
        return None
    return to_batch(block, "pandas")


def _series_memory(series: Any) -> Array | None:
    if not isinstance(series.dtype, np.dtype | TensorDtype):
        return None
    values: Array = series.to_numpy()
    return None if values.dtype == object else values


def _arrow_memory(block: pa.Table, name: str, column: pa.Array) -> Array | pa.Array | None:
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        if (
            not isinstance(kind, _FIXED_SHAPE_TENSORS)
            or column.null_count
            or pa.types.is_boolean(kind.storage_type.value_type)
        ):
            return None
        return cast("Array", BlockAccessor.for_block(block).to_numpy(name))
    if pa.types.is_null(kind):
        return None
    if pa.types.is_dictionary(kind) and not column.null_count:
        # As upstream, which however makes nulls the last of the dictionary's values.
        return pa.chunked_array([column])
    if column.null_count or not pa.types.is_primitive(kind):
        return column
    try:
        return cast("Array", column.to_numpy())
    except pa.ArrowException:
        return column


def _converted(column: pa.Array, rows: range) -> Iterator[Array]:
    """Convert as upstream does in the end, without the way through a table per batch."""
    return (column.slice(row, rows.step).to_numpy(zero_copy_only=False) for row in rows)


def _converted_by_ray(block: Block, name: str, rows: range) -> Iterator[Any]:
    # Selecting columns would copy them in pandas 2.
    alone = block[name].to_frame() if isinstance(block, pd.DataFrame) else block.select([name])
    slab = Slab(alone, None)
    return (
        BlockAccessor.for_block(slab.batch(row, row + rows.step)).to_numpy(name) for row in rows
    )


def _select(block: Block, names: list[str]) -> Block:
    return cast("Block", BlockAccessor.for_block(block).select(cast("list[str | None]", names)))
