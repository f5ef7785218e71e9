"""Blocks in, batches out: no I/O, no waiting, no event loop.

A pipeline is fed with blocks and asked for batches by whoever drives it. Asking costs about a
microsecond per batch where columns are plain memory, because `asyncsplit.formats` has made one
array per column and block, and a batch is a dict of views.
"""

import secrets
from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar

import pandas as pd
import pyarrow as pa

from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.formats import (
    AnyBlock,
    Run,
    Slab,
    as_block,
    cut,
    resolve_batch_format,
    row_count,
    row_lists,
    to_batch,
    windows,
)
from asyncsplit.plain import PlainBlock
from asyncsplit.shuffle_buffer import ShuffleBuffer


class Pipeline:
    """Cut a sequence of blocks into batches.

    Call ``next(pipeline.batches)``: it returns a batch, or None if it needs more input, then
    `add` or `finish` and call again. After the last batch it raises StopIteration. What is
    handed out is not kept: a batch is freed when its user drops it, a block with its last batch.
    If a conversion fails, the error is raised once and StopIteration from then on.
    """

    conversion: ClassVar[None] = None
    """All there is to wait for is input, unlike in `asyncsplit.collate`."""

    def __init__(
        self,
        *,
        batch_size: int | None,
        batch_format: str | None,
        drop_last: bool = False,
        shuffle_buffer_size: int | None = None,
        shuffle_seed: int | None = None,
        pandas_as_arrow: bool = False,
    ) -> None:
        """Start without input; arguments as those of ``ray.data.DataIterator.iter_batches``.

        With ``pandas_as_arrow`` batches from pandas blocks are Arrow tables, whatever the format.

        Raises:
            ValueError: If the format is unknown, or rows are to be shuffled without a batch size.
        """
        self._format = resolve_batch_format(batch_format)
        self._pandas_format = "pyarrow" if pandas_as_arrow else self._format
        self._size = batch_size
        self._drop_last = drop_last
        self.blocks: deque[AnyBlock] = deque()
        """Blocks added and not yet begun."""
        self.finished = False
        """Whether no more blocks come."""
        self._carry: list[tuple[Slab, int, int]] = []
        self._carried = 0
        self._whole_blocks = 0
        self.rows_in = 0
        """Rows of all blocks added, but for those that an earlier pipeline has delivered.

        Until it is known which those are, they are taken to be the first.
        """
        self.rows_out = 0
        """Rows of all batches handed out."""
        self.rows_dropped = 0
        """Rows of the last batch, if it was dropped for not being full."""
        self._padding: list[int] = []
        self.shuffle: ShuffleKey | None = None
        """What the order is drawn from, also if no seed was given; None if it is the input's."""
        self._shuffle: ShuffleBuffer | None = None
        self._repeats = 0
        if shuffle_buffer_size is not None:
            if batch_size is None:
                raise ValueError("Must specify a batch_size if using a local shuffle.")
            seed = secrets.randbits(63) if shuffle_seed is None else shuffle_seed
            self.shuffle = ShuffleKey(shuffle_buffer_size, batch_size, seed)
            self._shuffle = ShuffleBuffer(self.shuffle)
        self.takes_plain = self._format == "numpy" and self._shuffle is None
        """Whether `asyncsplit.plain` blocks can be added, which take less time than tables."""
        self.batches: Generator[Any, None, None] = self._run()
        """The batches, and None wherever input is missing."""

    def resume(self, skipped: Sequence[int], delivered: int, seed: int | None = None) -> None:
        """Go on where an earlier pipeline of the same sizes was, given the same input.

        Then `add` the blocks after the skipped ones, whole. What comes are the batches that were
        not delivered, in the same order. (Where blocks have unlike types, or Arrow dictionaries,
        those of a batch can depend on what else is in the buffer, which is less at first.) All
        counts begin anew, so to resume once more, add them up.

        The order of what was delivered is drawn again: 20 to 70 ms per million rows, most of it
        here, where nothing else is touched, so that another thread can do it.

        Args:
            skipped: Rows of each of the input's first blocks, all of which were delivered; if the
                last batch was dropped for not being full, that counts as delivered.
            delivered: How many rows were delivered: a multiple of the batch size, or all.
            seed: What the earlier pipeline's order is drawn from; None if it had this one's seed.

        Raises:
            ValueError: If rows are not shuffled, the pipeline has input already, or the numbers
                cannot be right. If only the input shows that, the next batch raises it.
        """
        if self._shuffle is None or self.shuffle is None:
            raise ValueError(
                "only a pipeline that shuffles can resume: otherwise add what was not delivered"
            )
        if self.finished or self._shuffle.has_input:
            raise ValueError("resume() comes once, before the first add() or finish()")
        if (lowest := min(delivered, min(skipped, default=0))) < 0:
            raise ValueError(f"numbers of rows cannot be negative, as {lowest} is")
        finished = sum(skipped)
        if finished - delivered >= (self.shuffle.batch_size if self._drop_last else 1):
            raise ValueError(
                f"{finished} rows are skipped, but only {delivered} were delivered:"
                " skip only blocks of which every row was"
            )
        self._repeats = max(0, delivered - finished)
        if seed is not None:
            self.shuffle = self.shuffle._replace(seed=seed)
        self._shuffle.resume(skipped, finished + self._repeats, self.shuffle.seed)

    def add(self, block: Any, start: int, stop: int, *, padding: bool = False) -> None:
        """Take rows `start` to `stop` of a block; calls are in the order of the rows.

        ``padding`` says that these rows repeat others, as do all that come after them.

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
            self._shuffle.expect(stop - start, padding=padding)
        elif padding:
            self._padding.extend(range(self.rows_in, self.rows_in + stop - start))
        if start < stop:
            self.blocks.append(cut(block, start, stop))
            repeats = min(self._repeats, stop - start)
            self._repeats -= repeats
            self.rows_in += stop - start - repeats

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
    def padded_rows(self) -> int:
        """Rows handed out that repeat others."""
        return self.padded_among(self.rows_out)

    def padded_among(self, rows: int) -> int:
        """Return how many of the first so many rows handed out repeat others."""
        padding = self._padding if self._shuffle is None else self._shuffle.padding
        return bisect_left(padding, rows)

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
            if isinstance(block, PlainBlock):
                batch: list[Any] = [block.columns]
            elif self._format == "numpy" and isinstance(block, pa.Table):
                batch = [Slab(block, "numpy").batch(0, rows)]
            else:
                batch = [to_batch(block, self._format_for(block))]
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
            runs = self._runs(Slab(block, self._format_for(block)), size)
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

    def _format_for(self, block: AnyBlock) -> str | None:
        return self._pandas_format if isinstance(block, pd.DataFrame) else self._format

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

    def _in_order(self) -> Iterator[AnyBlock | None]:
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
