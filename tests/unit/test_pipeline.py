"""Cutting blocks into batches: values, counts, order and lifetimes."""

import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.data import DataContext
from ray.data.block import BlockAccessor

from asyncsplit import engine
from asyncsplit.core.shuffle import DRAW_ROWS, ShuffleKey, ShufflePlan
from asyncsplit.formats import SUPPORTED_FORMATS, block_rows, resolve_batch_format
from asyncsplit.pipeline import Pipeline, RowPipeline
from tests.profiles import FEWER
from tests.same import assert_same, feed

# Ray's accessors use what the newest pandas has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")

FORMATS = ["numpy", "pandas", "pyarrow", None]


formats = st.sampled_from(FORMATS)
counts_of_rows = st.lists(st.integers(0, 25), max_size=8)
batch_sizes = st.integers(1, 30)


def table(start: int, stop: int) -> pa.Table:
    """Columns of every kind of conversion; rows are known by their numbers."""
    rows = range(start, stop)
    return pa.table(
        {
            "id": pa.array(rows, pa.int64()),
            "null": pa.array([None if row % 7 == 0 else row for row in rows], pa.int32()),
            "text": pa.array([str(row) for row in rows], pa.string()),
            "none": pa.nulls(len(rows)),
        }
    )


def frame(start: int, stop: int) -> pd.DataFrame:
    rows = np.arange(start, stop)
    return pd.DataFrame(
        {
            "id": rows,
            "half": rows / 2,
            "text": rows.astype(str),
            "array": [np.full(2, row) for row in rows],
        }
    )


def blocks_of(counts: list[int], make: Any = table) -> list[Any]:
    ends = np.cumsum([0, *counts]).tolist()
    return [make(a, b) for a, b in pairwise(ends)]


def in_chunks(block: pa.Table, rows: int) -> pa.Table:
    pieces = [block.slice(row, rows) for row in range(0, len(block), rows)]
    return pa.concat_tables(pieces) if pieces else block


def expected(
    counts: list[int], make: Any, batch_size: int | None, batch_format: str | None, drop_last: bool
) -> list[Any]:
    """Build each batch as Ray Data does: cut what belongs to it, join that, convert it."""
    ends = np.cumsum([0, *counts]).tolist()
    if batch_size is None:
        cuts = list(pairwise(ends))
    else:
        cuts = [(row, min(row + batch_size, ends[-1])) for row in range(0, ends[-1], batch_size)]
        if drop_last:
            cuts = [(start, stop) for start, stop in cuts if stop - start == batch_size]
    batches = []
    for start, stop in cuts:
        parts = [make(max(a, start), min(b, stop)) for a, b in pairwise(ends)]
        parts = [part for part in parts if len(part)]
        if parts:
            block = parts[0] if batch_size is None else engine.concat_blocks(parts)
            batches.append(BlockAccessor.for_block(block).to_batch_format(batch_format))
    return batches


def ids(batches: list[Any]) -> list[int]:
    return [int(row) for batch in batches for row in np.asarray(batch["id"])]


@FEWER
@given(counts_of_rows, st.none() | batch_sizes, formats, st.booleans())
def test_batches_of_arrow_blocks(
    counts: list[int], batch_size: int | None, batch_format: str | None, drop_last: bool
) -> None:
    pipeline = Pipeline(batch_size=batch_size, batch_format=batch_format, drop_last=drop_last)
    batches = list(feed(pipeline, blocks_of(counts)))
    assert_same(batches, expected(counts, table, batch_size, batch_format, drop_last))
    assert pipeline.batches_out == len(batches)
    assert pipeline.rows_in == sum(counts) == pipeline.rows_out + pipeline.rows_dropped
    assert pipeline.rows_buffered == 0
    if not drop_last:
        assert pipeline.rows_dropped == 0


@FEWER
@given(
    st.lists(st.integers(0, 9), max_size=5), st.none() | st.integers(1, 9), formats, st.booleans()
)
def test_batches_of_pandas_blocks(
    counts: list[int], batch_size: int | None, batch_format: str | None, drop_last: bool
) -> None:
    pipeline = Pipeline(batch_size=batch_size, batch_format=batch_format, drop_last=drop_last)
    batches = list(feed(pipeline, blocks_of(counts, frame)))
    assert_same(batches, expected(counts, frame, batch_size, batch_format, drop_last))


@pytest.mark.parametrize("arrow_backed", [True, False])
@FEWER
@given(counts=counts_of_rows, batch_size=batch_sizes)
def test_data_frames_of_arrow_blocks(
    arrow_backed: bool, counts: list[int], batch_size: int
) -> None:
    def make(start: int, stop: int) -> pa.Table:
        return table(start, stop).drop_columns("none")

    with pytest.MonkeyPatch.context() as patch:
        context = DataContext.get_current()
        # The oldest Ray has no such setting, and makes frames as if it were off.
        patch.setattr(context, "enable_arrow_backed_pandas_conversion", arrow_backed, raising=False)
        batches = list(
            feed(Pipeline(batch_size=batch_size, batch_format="pandas"), blocks_of(counts, make))
        )
        assert_same(batches, expected(counts, make, batch_size, "pandas", False))


def test_writing_to_a_data_frame_changes_no_other() -> None:
    block = table(0, 12).drop_columns("none")
    pipeline = Pipeline(batch_size=4, batch_format="pandas")
    first, second, third = feed(pipeline, [block])
    second.loc[:, "id"] = -1
    second.iloc[0, 1] = -1
    second["new"] = second.pop("text")
    assert_same(
        [first, third],
        [block.slice(row, 4).to_pandas(types_mapper=pd.ArrowDtype) for row in (0, 8)],
    )
    assert block.equals(table(0, 12).drop_columns("none"))
    assert second["id"].to_list() == [-1] * 4
    assert second["null"].to_list()[1:] == [5, 6, pd.NA]


@FEWER
@given(
    counts_of_rows,
    batch_sizes,
    formats,
    st.integers(1, 10),
    st.sampled_from([1, 200, 1000]),
)
def test_batches_do_not_depend_on_chunks_and_windows(
    counts: list[int], batch_size: int, batch_format: str | None, chunk: int, window: int
) -> None:
    blocks = [in_chunks(block, chunk) for block in blocks_of(counts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asyncsplit.formats.WINDOW_BYTES", window)
        batches = list(feed(Pipeline(batch_size=batch_size, batch_format=batch_format), blocks))
    assert_same(batches, expected(counts, table, batch_size, batch_format, False))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))), batch_sizes)
def test_rows_outside_of_start_and_stop_are_left_out(
    parts: list[tuple[int, int, int]], batch_size: int
) -> None:
    pipeline = Pipeline(batch_size=batch_size, batch_format="numpy")
    wanted: list[int] = []
    row = 0
    for before, rows, after in parts:
        block = table(row, row + before + rows + after)
        pipeline.add(block, before, before + rows)
        wanted += range(row + before, row + before + rows)
        row += len(block)
    pipeline.finish()
    assert ids(list(pipeline.batches)) == wanted
    assert pipeline.rows_in == len(wanted)


@pytest.mark.parametrize("shuffle", [None, 20])
@FEWER
@given(counts_of_rows, batch_sizes, formats, st.lists(st.integers(0, 4)))
def test_batches_do_not_depend_on_when_blocks_come(
    shuffle: int | None,
    counts: list[int],
    batch_size: int,
    batch_format: str | None,
    early: list[int],
) -> None:
    def make() -> Pipeline:
        return Pipeline(
            batch_size=batch_size,
            batch_format=batch_format,
            shuffle_buffer_size=shuffle,
            shuffle_seed=5,
        )

    one_by_one = list(feed(make(), blocks_of(counts)))

    pipeline = make()
    blocks = blocks_of(counts)
    batches = []
    for number in early:
        for block in blocks[:number]:
            pipeline.add(block, 0, len(block))
        blocks = blocks[number:]
        while (batch := next(pipeline.batches)) is not None:
            batches.append(batch)
        before = (pipeline.rows_in, pipeline.rows_out, pipeline.rows_buffered)
        assert next(pipeline.batches) is None
        assert next(pipeline.batches) is None
        assert (pipeline.rows_in, pipeline.rows_out, pipeline.rows_buffered) == before
    assert_same(batches + list(feed(pipeline, blocks)), one_by_one)


def test_counts_are_those_of_batches_handed_out() -> None:
    pipeline = Pipeline(batch_size=4, batch_format="numpy", drop_last=True)
    assert next(pipeline.batches) is None
    for block in blocks_of([3, 10]):
        pipeline.add(block, 0, len(block))
    pipeline.finish()
    assert (pipeline.rows_in, pipeline.rows_out, pipeline.rows_buffered) == (13, 0, 13)
    for number, _ in enumerate(pipeline.batches, 1):
        assert (pipeline.rows_out, pipeline.batches_out) == (4 * number, number)
        assert pipeline.rows_buffered == 13 - 4 * number - pipeline.rows_dropped
    assert (pipeline.rows_out, pipeline.rows_dropped, pipeline.rows_buffered) == (12, 1, 0)


def test_record_batches_and_bytes_are_blocks() -> None:
    block = table(0, 5)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema) as writer:
        writer.write_table(block)
    blocks = [block.to_batches()[0], sink.getvalue().to_pybytes()]
    pipeline = Pipeline(batch_size=8, batch_format=None)
    for other in blocks:
        pipeline.add(other, 0, 5)
    pipeline.finish()
    assert pa.concat_tables(pipeline.batches).equals(pa.concat_tables([block, block]))


def test_what_is_no_block_is_refused() -> None:
    pipeline = Pipeline(batch_size=8, batch_format=None)
    with pytest.raises(TypeError, match="Not a block type"):
        pipeline.add("text", 0, 1)
    for start, stop in ((-1, 1), (2, 1), (0, 6)):
        with pytest.raises(ValueError, match=f"rows {start} to {stop} are not within .* 5 rows"):
            pipeline.add(table(0, 5), start, stop)
    pipeline.finish()
    with pytest.raises(ValueError, match=r"after finish\(\)"):
        pipeline.add(table(0, 5), 0, 5)


@pytest.mark.parametrize("batch_format", FORMATS)
def test_a_conversion_that_fails_is_not_counted(batch_format: str | None) -> None:
    blocks = [table(0, 6), pa.table({"id": [{"no": "number"}] * 6})]
    pipeline = Pipeline(batch_size=4, batch_format=batch_format)
    batches = feed(pipeline, blocks)
    next(batches)
    with pytest.raises(Exception, match="id"):
        next(batches)
    assert (pipeline.rows_out, pipeline.batches_out) == (4, 1)
    assert next(pipeline.batches, "ended") == "ended"


def test_a_column_that_fails_in_the_middle_is_not_counted() -> None:
    text = pa.array([b"good"] * 9 + [b"\xff"] + [b"good"] * 5, pa.binary()).view(pa.string())
    pipeline = Pipeline(batch_size=2, batch_format="numpy")
    batches = feed(pipeline, [pa.table({"x": text})])
    for _ in range(4):
        next(batches)
    with pytest.raises(pa.ArrowException):
        next(batches)
    assert (pipeline.rows_out, pipeline.batches_out) == (8, 4)


def memory(rows: int) -> tuple[pa.Table, "weakref.ref[Any]"]:
    """Return a block, and a reference to the memory it keeps alive."""
    values = np.arange(rows)
    return pa.table({"id": pa.array(values)}), weakref.ref(values)


def make_pipeline(kind: str) -> Pipeline:
    if kind == "rows":
        return RowPipeline()
    if kind == "whole":
        return Pipeline(batch_size=None, batch_format="numpy")
    if kind.startswith("shuffle"):
        return Pipeline(batch_size=4, batch_format=kind[8:], shuffle_buffer_size=6)
    return Pipeline(batch_size=4, batch_format=kind)


KINDS = ["numpy", "pandas", "pyarrow", "shuffle numpy", "shuffle pyarrow", "whole", "rows"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [[8], [6, 6], [4, 5, 1, 2], [3, 3]])
def test_a_block_is_freed_with_its_last_batch(kind: str, rows: list[int]) -> None:
    pipeline = make_pipeline(kind)
    held = []
    for number in rows:
        block, ref = memory(number)
        held.append(ref)
        pipeline.add(block, 0, number)
        del block
    pipeline.finish()
    ends = np.cumsum(rows).tolist()
    gc.disable()
    try:
        while pipeline.rows_buffered:
            batch = next(pipeline.batches)
            del batch
            for end, ref in zip(ends, held, strict=True):
                if pipeline.rows_out >= end and "shuffle" not in kind:
                    assert ref() is None
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["numpy", "pandas", "pyarrow", "shuffle numpy", "whole"])
def test_a_batch_is_freed_when_its_user_drops_it(kind: str) -> None:
    pipeline = make_pipeline(kind)
    gc.disable()
    try:
        for block in blocks_of([9, 1, 2, 11]):
            pipeline.add(block, 0, len(block))
        pipeline.finish()
        for batch in pipeline.batches:
            ref = weakref.ref(batch["id"] if isinstance(batch, dict) else batch)
            del batch
            assert ref() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", KINDS)
def test_closing_lets_go_of_everything(kind: str) -> None:
    pipeline = make_pipeline(kind)
    held = []
    for _ in range(6):
        block, ref = memory(7)
        held.append(ref)
        pipeline.add(block, 0, 7)
        del block
    next(pipeline.batches)
    out = pipeline.rows_out
    pipeline.close()
    assert all(ref() is None for ref in held)
    assert (pipeline.rows_out, next(pipeline.batches, "ended")) == (out, "ended")
    pipeline.close()


@FEWER
@given(counts_of_rows, batch_sizes, st.integers(1, 60), formats, st.booleans(), st.booleans())
def test_shuffled_batches(
    counts: list[int],
    batch_size: int,
    buffer_size: int,
    batch_format: str | None,
    drop_last: bool,
    chunked: bool,
) -> None:
    blocks = blocks_of(counts)
    if chunked:
        blocks = [in_chunks(block, 4) for block in blocks]

    def batches_in(batch_format: str | None) -> Iterator[Any]:
        pipeline = Pipeline(
            batch_size=batch_size,
            batch_format=batch_format,
            drop_last=drop_last,
            shuffle_buffer_size=buffer_size,
            shuffle_seed=3,
        )
        yield from feed(pipeline, blocks)
        assert pipeline.rows_in == pipeline.rows_out + pipeline.rows_dropped

    rows = ids(list(batches_in("numpy")))
    left_out = sum(counts) % batch_size if drop_last else 0
    assert len(rows) == len(set(rows)) == sum(counts) - left_out
    assert set(rows) <= set(range(sum(counts)))
    batches = list(batches_in(batch_format))
    wanted = []
    for first in range(0, len(rows), batch_size):
        taken = [table(row, row + 1) for row in rows[first : first + batch_size]]
        block = pa.concat_tables(taken).combine_chunks()
        wanted.append(BlockAccessor.for_block(block).to_batch_format(batch_format))
    assert_same(batches, wanted)


def planned(plan: ShufflePlan, counts: Iterator[int]) -> list[int]:
    rows: list[int] = []
    while True:
        while plan.wants_input:
            if (count := next(counts, None)) is None:
                plan.finish()
            else:
                plan.add(count)
        plan.refill()
        if not len(places := plan.draw()):
            return rows
        rows += plan.input_rows(places).tolist()


def mixed_blocks() -> list[Any]:
    """Columns that are plain memory in some blocks only, and blocks of unlike types."""
    return [
        pa.table({"id": range(10), "x": [1] * 10}),
        pa.table({"id": range(10, 20), "x": pa.array([None] * 10, pa.int64())}),
        pa.table({"id": range(20, 30), "x": [0.5] * 10}),
        pd.DataFrame({"id": range(30, 40), "x": [2.5] * 10}),
        pa.table({"x": pa.array([3] * 300, pa.int8()), "id": range(40, 340)}),
    ]


@pytest.mark.parametrize("small", [1, 600, 2**20])
@pytest.mark.parametrize("batch_format", FORMATS)
def test_unlike_blocks_are_shuffled_together(
    batch_format: str | None, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncsplit.shuffle_buffer.SMALL_BYTES", small)
    pipeline = Pipeline(
        batch_size=7, batch_format=batch_format, shuffle_buffer_size=25, shuffle_seed=2
    )
    blocks = mixed_blocks()
    batches = list(feed(pipeline, blocks))
    assert ids(batches) == planned(ShufflePlan(25, 7, seed=2), map(len, blocks))
    x = np.concatenate([np.asarray(batch["x"], float) for batch in batches])
    values = dict(zip(ids(batches), x.tolist(), strict=True))
    expect = [1.0] * 10 + [np.nan] * 10 + [0.5] * 10 + [2.5] * 10 + [3.0] * 300
    np.testing.assert_array_equal([values[row] for row in range(340)], expect)


def test_names_of_columns_mean_nothing() -> None:
    blocks = [pd.DataFrame({"id": range(9), "schema": "a", "columns": 1, "index": 2})] * 3
    for shuffle in (None, 10):
        pipeline = Pipeline(batch_size=5, batch_format="numpy", shuffle_buffer_size=shuffle)
        assert sorted(ids(list(feed(pipeline, blocks)))) == sorted([*range(9)] * 3)


def test_positions_are_not_labels() -> None:
    blocks = [pd.DataFrame({"id": range(4)}, index=[0.0, 0.5, 1.0, 7.0])]
    assert ids(list(feed(Pipeline(batch_size=2, batch_format="numpy"), blocks))) == [0, 1, 2, 3]


def test_a_seed_is_drawn_if_none_is_given() -> None:
    def shuffled(seed: int | None) -> tuple[ShuffleKey, list[int]]:
        pipeline = Pipeline(
            batch_size=8, batch_format="numpy", shuffle_buffer_size=100, shuffle_seed=seed
        )
        assert pipeline.shuffle is not None
        return pipeline.shuffle, ids(list(feed(pipeline, blocks_of([100, 100]))))

    key, rows = shuffled(None)
    other_key, other_rows = shuffled(None)
    assert key == (100, 8, key.seed)
    assert key.seed != other_key.seed
    assert rows != other_rows
    assert shuffled(key.seed) == (key, rows)
    assert Pipeline(batch_size=8, batch_format="numpy").shuffle is None


def test_a_shuffle_needs_a_batch_size() -> None:
    with pytest.raises(ValueError, match="Must specify a batch_size if using a local shuffle"):
        Pipeline(batch_size=None, batch_format="numpy", shuffle_buffer_size=3)


@FEWER
@given(counts_of_rows, batch_sizes, st.integers(1, 60))
def test_the_oldest_unfinished_block_is_never_named_too_late(
    counts: list[int], batch_size: int, buffer_size: int
) -> None:
    pipeline = Pipeline(
        batch_size=batch_size,
        batch_format="numpy",
        shuffle_buffer_size=buffer_size,
        shuffle_seed=9,
    )
    block_of = np.repeat(np.arange(len(counts)), counts)
    finished: set[int] = set()
    oldest = pipeline.oldest_unfinished
    assert oldest == 0
    for batch in feed(pipeline, blocks_of(counts)):
        unfinished = set(range(sum(counts))) - finished
        named = pipeline.oldest_unfinished
        assert named is not None
        assert oldest <= named <= block_of[min(unfinished)]
        oldest = named
        finished |= set(ids([batch]))
    assert pipeline.oldest_unfinished == len(counts)


class Leg(NamedTuple):
    """What one of several pipelines, each going on where the one before stopped, has done."""

    batches: list[Any]
    skipped: int
    delivered: int


def run_leg(
    pipeline: Pipeline,
    blocks: list[Any],
    before: Leg,
    batches: int | None,
    *,
    unfinished: bool = False,
    exact: bool = False,
) -> Leg:
    """Resume after `before`, take up to so many batches, and return the totals.

    Args:
        pipeline: The pipeline to resume.
        blocks: The whole input.
        before: What has been done so far.
        batches: How many batches to take; None for all.
        unfinished: Whether the last batch is still in use, and so does not count as delivered.
        exact: Whether to skip all blocks possible, instead of what the pipeline says.
    """
    skipped, delivered = before.skipped, before.delivered
    block_of = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
    done = set(ids(before.batches))
    if skipped or delivered:
        pipeline.resume([len(block) for block in blocks[:skipped]], delivered)
    assert pipeline.oldest_unfinished == 0
    assert pipeline.rows_in == pipeline.rows_out == pipeline.batches_out == 0
    ours: list[Any] = []
    source = feed(pipeline, blocks[skipped:])
    while batches is None or len(ours) < batches:
        if (batch := next(source, None)) is None:
            break
        assert pipeline.rows_buffered >= 0
        assert pipeline.oldest_unfinished is not None
        # A batch may still be in use while its successor is not asked for.
        left = min(set(range(len(block_of))) - done)
        assert skipped + pipeline.oldest_unfinished <= block_of[left]
        ours.append(batch)
        done |= set(ids([batch]))
    assert pipeline.batches_out == len(ours)
    assert pipeline.rows_out == sum(len(ids([batch])) for batch in ours)
    oldest = pipeline.oldest_unfinished
    assert oldest is not None
    if batches is None:
        assert pipeline.rows_buffered == 0
        assert skipped + oldest == len(blocks)
        assert pipeline.rows_in == pipeline.rows_out + pipeline.rows_dropped
    elif unfinished and ours and len(ours) == batches:
        ours.pop()
    delivered += len(ids(ours))
    skipped += oldest
    if exact and (rest := set(range(len(block_of))) - set(ids([*before.batches, *ours]))):
        skipped = int(block_of[min(rest)])
    return Leg([*before.batches, *ours], skipped, delivered)


@pytest.mark.parametrize("draw_rows", [8, DRAW_ROWS])
@FEWER
@given(
    st.lists(st.integers(0, 25), max_size=16),
    st.integers(1, 12),
    st.integers(1, 60),
    st.integers(0, 2**63),
    formats,
    st.sampled_from([table, frame]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2000, 4 * 2**20]),
    st.lists(st.integers(0, 30), max_size=3),
)
def test_a_resumed_shuffle_delivers_the_rest(
    draw_rows: int,
    counts: list[int],
    batch_size: int,
    buffer_size: int,
    seed: int,
    batch_format: str | None,
    make: Any,
    drop_last: bool,
    unfinished: bool,
    exact: bool,
    small: int,
    cuts: list[int],
) -> None:
    def pipeline() -> Pipeline:
        return Pipeline(
            batch_size=batch_size,
            batch_format=batch_format,
            drop_last=drop_last,
            shuffle_buffer_size=buffer_size,
            shuffle_seed=seed,
        )

    blocks = blocks_of(counts, make)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asyncsplit.core.shuffle.DRAW_ROWS", draw_rows)
        patch.setattr("asyncsplit.shuffle_buffer.SMALL_BYTES", small)
        whole = list(feed(pipeline(), blocks))
        leg = Leg([], 0, 0)
        for batches in cuts:
            leg = run_leg(pipeline(), blocks, leg, batches, unfinished=unfinished, exact=exact)
        leg = run_leg(pipeline(), blocks, leg, None)
        assert_same(leg.batches, whole)
        # At the end nothing is to come, whether or not a last batch was dropped.
        assert run_leg(pipeline(), blocks, leg, None) == leg
    if drop_last:
        assert leg.delivered == sum(counts) // batch_size * batch_size
    else:
        assert leg.delivered == sum(counts)


def shuffling(**options: Any) -> Pipeline:
    return Pipeline(
        batch_size=4, batch_format="numpy", shuffle_buffer_size=6, shuffle_seed=1, **options
    )


@pytest.mark.parametrize("small", [1, 600, 2**20])
@pytest.mark.parametrize("batches", range(0, 86, 17))
def test_a_shuffle_of_unlike_blocks_resumes(
    small: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncsplit.shuffle_buffer.SMALL_BYTES", small)
    blocks = [*mixed_blocks()[:4], in_chunks(mixed_blocks()[4], 70)]
    leg = run_leg(shuffling(), blocks, Leg([], 0, 0), batches, exact=True)
    leg = run_leg(shuffling(), blocks, leg, None)
    assert ids(leg.batches) == ids(list(feed(shuffling(), blocks)))


def test_a_shuffle_resumes_after_it_has_asked_for_input() -> None:
    blocks = blocks_of([10] * 6)
    whole = list(feed(shuffling(), blocks))
    pipeline = shuffling()
    assert next(pipeline.batches) is None
    pipeline.resume([], 24)
    assert_same(list(feed(pipeline, blocks)), whole[6:])


def test_a_skip_of_all_blocks_ends_a_shuffle_with_a_dropped_batch() -> None:
    for delivered in (8, 10):
        pipeline = shuffling(drop_last=True)
        pipeline.resume([5, 0, 5], delivered)
        assert list(feed(pipeline, [])) == []
        assert (pipeline.rows_in, pipeline.rows_buffered, pipeline.rows_dropped) == (0, 0, 0)


def test_rows_delivered_before_are_not_counted() -> None:
    pipeline = shuffling()
    pipeline.resume([], 12)
    seen = []
    for block in blocks_of([10] * 3):
        pipeline.add(block, 0, 10)
        seen.append((pipeline.rows_in, pipeline.rows_buffered))
    assert seen == [(0, 0), (8, 8), (18, 18)]
    pipeline.finish()
    next(pipeline.batches)
    assert (pipeline.rows_out, pipeline.batches_out, pipeline.rows_buffered) == (4, 1, 14)


def test_blocks_of_which_nothing_is_to_come_are_freed_while_others_are_waited_for() -> None:
    counts = [8] * 50
    whole = shuffling()
    batches = feed(whole, blocks_of(counts))
    for _ in range(60):
        next(batches)
    pipeline = shuffling()
    pipeline.resume([], 240)
    held = []
    for number in counts[:25]:
        block, ref = memory(number)
        held.append(ref)
        pipeline.add(block, 0, number)
        del block
        assert next(pipeline.batches) is None
    assert sum(ref() is not None for ref in held) < 6


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (Pipeline(batch_size=4, batch_format="numpy"), "only a pipeline that shuffles"),
        (RowPipeline(), "only a pipeline that shuffles"),
    ],
)
def test_in_order_there_is_nothing_to_resume(pipeline: Pipeline, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.resume([], 0)


@pytest.mark.parametrize("before", ["add", "add nothing", "finish", "resume"])
def test_a_shuffle_resumes_only_at_its_start(before: str) -> None:
    pipeline = shuffling()
    if before == "finish":
        pipeline.finish()
    elif before == "resume":
        pipeline.resume([8], 8)
    else:
        pipeline.add(table(0, 5), 0, 5 if before == "add" else 0)
    with pytest.raises(ValueError, match=r"once, before the first add\(\) or finish\(\)"):
        pipeline.resume([8], 8)


@pytest.mark.parametrize(
    ("skipped", "delivered", "drop_last", "message"),
    [
        ([], -4, False, "cannot be negative, as -4 is"),
        ([3, -1], 4, False, "cannot be negative, as -1 is"),
        ([9], 8, False, "9 rows are skipped, but only 8 were delivered"),
        ([8, 4], 8, True, "12 rows are skipped, but only 8 were delivered"),
    ],
)
def test_impossible_numbers_are_refused_at_once(
    skipped: list[int], delivered: int, drop_last: bool, message: str
) -> None:
    pipeline = shuffling(drop_last=drop_last)
    with pytest.raises(ValueError, match=message):
        pipeline.resume(skipped, delivered)
    assert len(list(feed(pipeline, blocks_of([5])))) == (1 if drop_last else 2)


@pytest.mark.parametrize(
    ("skipped", "delivered", "drop_last", "message"),
    [
        ([], 44, False, "cannot resume after 44 rows of an input of 40"),
        ([10], 44, False, "cannot resume after 44 rows of an input of 40"),
        ([], 10, False, "cannot resume after 10 rows: all batches but the last have 4"),
        ([10] * 3, 32, False, r"row \d+ is not among the first 32 to be delivered"),
        ([10], 8, True, r"row \d+ is not among the first 10 to be delivered"),
    ],
)
def test_impossible_numbers_are_refused_once_the_input_shows_it(
    skipped: list[int], delivered: int, drop_last: bool, message: str
) -> None:
    pipeline = shuffling(drop_last=drop_last)
    pipeline.resume(skipped, delivered)
    with pytest.raises(ValueError, match=message):
        list(feed(pipeline, blocks_of([10] * 4)[len(skipped) :]))
    assert next(pipeline.batches, "ended") == "ended"


def test_in_order_nobody_needs_to_name_the_oldest_unfinished_block() -> None:
    assert Pipeline(batch_size=1, batch_format=None).oldest_unfinished is None


@FEWER
@given(counts_of_rows, st.integers(1, 40))
def test_rows_one_by_one(counts: list[int], cells: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asyncsplit.formats.WINDOW_CELLS", cells)
        pipeline = RowPipeline()
        rows = list(feed(pipeline, blocks_of(counts)))
        assert rows == table(0, sum(counts)).to_pylist()
        assert pipeline.rows_out == pipeline.batches_out == sum(counts)
        assert list(block_rows(table(3, 9))) == rows[3:9] or sum(counts) < 9


def test_formats() -> None:
    assert resolve_batch_format("default") == "numpy"
    for name in ("numpy", "pandas", "pyarrow", None):
        assert resolve_batch_format(name) == name
    with pytest.raises(ValueError, match="batch_format='arrow' is unknown: use one of"):
        resolve_batch_format("arrow")
    with pytest.raises(ValueError, match="batch_format='torch' is unknown"):
        Pipeline(batch_size=1, batch_format="torch")
    assert "cudf" in SUPPORTED_FORMATS
    with pytest.raises(ValueError, match="needs the package cudf, which is not installed"):
        resolve_batch_format("cudf")
