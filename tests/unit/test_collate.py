"""Batches that threads make ahead of the loop: in order, counted when handed out, never kept."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.data.collate_fn import (
    ArrowBatchCollateFn,
    CollateFn,
    NumpyBatchCollateFn,
    PandasBatchCollateFn,
)

from asyncsplit.collate import SKIPPED, Collated, Converted, Recipe, input_format
from asyncsplit.formats import row_count
from asyncsplit.pipeline import Pipeline
from tests.profiles import FEWER
from tests.same import assert_same, feed


def block(start: int, rows: int) -> pa.Table:
    return pa.table({"id": np.arange(start, start + rows)})


def ids(batch: Any) -> list[int]:
    return batch["id"].tolist()  # type: ignore[no-any-return]


def collated(convert: Callable[[Any], Any], *, ahead: int = 2, **kwargs: Any) -> Collated:
    arguments = {"batch_size": 3, "batch_format": "numpy", **kwargs}
    return Collated(Pipeline(**arguments), convert, ahead=ahead)


def drain(pipeline: Any, blocks: list[pa.Table]) -> Iterator[Any]:
    """Yield the batches as a stream does: wait for a conversion, else give a block."""
    todo = iter(blocks)

    def advance(_: int) -> "Future[Any] | None":
        if (given := next(todo, None)) is None:
            pipeline.finish()
        else:
            pipeline.add(given, 0, row_count(given))
        return None

    pipeline.draw_from(advance)
    for batch in pipeline.batches:
        if batch is not None:
            yield batch
        elif pipeline.conversion is None:
            advance(0)
        else:
            futures.wait([pipeline.conversion])


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("asyncsplit-collate")]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    for thread in threads():
        thread.join(10)
    assert threads() == []


@FEWER
@given(
    sizes=st.lists(st.integers(1, 9), max_size=8),
    batch_size=st.none() | st.integers(1, 7),
    ahead=st.integers(0, 5),
    buffer=st.none() | st.integers(1, 12),
    drop_last=st.booleans(),
)
def test_the_batches_are_the_pipelines_in_order_and_counted_when_handed_out(
    sizes: list[int], batch_size: int | None, ahead: int, buffer: int | None, drop_last: bool
) -> None:
    arguments: dict[str, Any] = {
        **{"batch_size": batch_size, "batch_format": "numpy", "drop_last": drop_last},
        "shuffle_buffer_size": buffer if batch_size else None,
        "shuffle_seed": 7,
    }
    starts = np.cumsum([0, *sizes]).tolist()
    blocks = [block(start, rows) for start, rows in zip(starts, sizes, strict=False)]
    plain = Pipeline(**arguments)
    expected = list(map(ids, feed(plain, blocks)))
    stage = collated(ids, ahead=ahead, **arguments)
    rows = 0
    for number, batch in enumerate(drain(stage, blocks)):
        assert batch == expected[number]
        rows += len(batch)
        assert (stage.rows_out, stage.batches_out) == (rows, number + 1)
        assert stage.rows_buffered >= 0
    assert (stage.batches_out, stage.rows_dropped) == (len(expected), plain.rows_dropped)
    assert stage.rows_out + stage.rows_dropped == sum(sizes)
    assert stage.oldest_unfinished == plain.oldest_unfinished


def test_batches_ahead_of_the_loop_are_made_while_it_works() -> None:
    made: list[int] = []
    third = threading.Event()

    def convert(batch: Any) -> list[int]:
        made.append(batch["id"][0])
        if len(made) == 3:
            third.set()
        return ids(batch)

    stage = collated(convert, ahead=2)
    batches = drain(stage, [block(0, 6), block(6, 3), block(9, 6)])
    assert next(batches) == [0, 1, 2]
    assert third.wait(10), "two more are made, the second of them from the next block"
    assert stage.rows_out == 3
    assert sorted(made) == [0, 3, 6]
    assert list(batches) == [[3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14]]


def test_nothing_is_made_ahead_if_nothing_is_asked_for_ahead() -> None:
    made: list[int] = []
    stage = collated(lambda batch: made.append(1) or ids(batch), ahead=0)  # type: ignore[func-returns-value]
    for number, _ in enumerate(drain(stage, [block(0, 9)])):
        assert len(made) == number + 1


def test_a_slow_batch_holds_up_the_ones_after_it() -> None:
    go = threading.Event()
    later = threading.Event()

    def convert(batch: Any) -> list[int]:
        if batch["id"][0] == 0:
            assert go.wait(10)
        else:
            later.set()
        return ids(batch)

    stage = collated(convert, ahead=1)
    stage._threads = futures.ThreadPoolExecutor(2, thread_name_prefix="asyncsplit-collate")
    stage.add(block(0, 6), 0, 6)
    assert next(stage) is None
    assert later.wait(10), "the second is made first"
    assert next(stage) is None
    go.set()
    assert stage.conversion is not None
    futures.wait([stage.conversion])
    assert [next(stage), next(stage)] == [[0, 1, 2], [3, 4, 5]]
    stage.close()


def test_input_that_comes_first_ends_the_wait_for_a_conversion() -> None:
    go = threading.Event()
    stage = collated(lambda batch: (go.wait(10), ids(batch))[1])
    awaited: Future[Any] = Future()
    stage.draw_from(lambda rows: awaited)
    stage.add(block(0, 3), 0, 3)
    assert next(stage) is None
    assert stage.conversion is not None
    assert not stage.conversion.done()
    awaited.set_result(None)
    assert stage.conversion.done()
    go.set()
    stage.close()


def test_a_batch_that_is_ready_does_not_wait_for_input() -> None:
    stage = collated(ids)
    asked: list[int] = []
    awaited: Future[Any] = Future()
    stage.draw_from(lambda rows: asked.append(rows) or awaited)  # type: ignore[func-returns-value]
    stage.add(block(0, 6), 0, 6)
    while (batch := next(stage)) is None:
        assert stage.conversion is not None
        futures.wait([stage._tasks[0].future])
    assert batch == [0, 1, 2]
    assert asked == [0], "what is awaited need not be asked for again"
    stage.close()


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("ahead", [0, 3])
def test_an_error_comes_in_the_place_of_its_batch_and_ends_the_stream(bad: int, ahead: int) -> None:
    def convert(batch: Any) -> list[int]:
        if batch["id"][0] == 3 * bad:
            raise KeyError("bad")
        return ids(batch)

    stage = collated(convert, ahead=ahead)
    batches = drain(stage, [block(0, 15)])
    assert [next(batches) for _ in range(bad)] == [
        [3 * i, 3 * i + 1, 3 * i + 2] for i in range(bad)
    ]
    with pytest.raises(KeyError, match="bad"):
        next(batches)
    assert stage.rows_out == 3 * bad
    assert list(stage.batches) == []


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
def test_a_collate_fn_cannot_pass_for_the_end_of_the_data(error: type[Exception]) -> None:
    def convert(batch: Any) -> Any:
        raise error

    with pytest.raises(RuntimeError, match=error.__name__):
        list(drain(collated(convert), [block(0, 3)]))


def test_an_error_of_the_input_comes_after_the_batches_before_it() -> None:
    stage = collated(ids, ahead=3)

    def advance(_: int) -> "Future[Any] | None":
        raise OSError("lost")

    stage.draw_from(advance)
    stage.add(block(0, 6), 0, 6)
    got: list[Any] = []
    with pytest.raises(OSError, match="lost"):  # noqa: PT012
        while True:
            if (batch := next(stage)) is not None:
                got.append(batch)
            elif stage.conversion is not None:
                futures.wait([stage.conversion])
    assert got == [[0, 1, 2], [3, 4, 5]]


def test_what_is_skipped_counts_with_the_batch_after_it() -> None:
    stage = collated(lambda batch: SKIPPED if batch["id"][0] == 0 else ids(batch))
    batches = drain(stage, [block(0, 9)])
    assert next(batches) == [3, 4, 5]
    assert (stage.rows_out, stage.batches_out) == (6, 1)
    assert list(batches) == [[6, 7, 8]]


def test_closing_lets_go_of_threads_and_of_what_was_not_begun() -> None:
    begun = threading.Event()
    go = threading.Event()
    made: list[int] = []

    def convert(batch: Any) -> None:
        made.append(batch["id"][0])
        begun.set()
        assert go.wait(10)

    stage = collated(convert, ahead=9)
    stage.add(block(0, 30), 0, 30)
    assert next(stage) is None
    assert begun.wait(10)
    stage.close()
    go.set()
    for thread in threads():
        thread.join(10)
    assert len(made) <= 4
    assert list(stage) == []


class Batch:
    """A batch that can be weakly referenced."""

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize("kind", [Converted, Collated])
def test_what_is_handed_out_is_not_kept(kind: type) -> None:
    pipeline = Pipeline(batch_size=3, batch_format="numpy")
    stage = kind(pipeline, Batch, **({"ahead": 0} if kind is Collated else {}))
    stage.add(block(0, 9), 0, 9)
    stage.finish()

    def take() -> "weakref.ref[Batch]":
        while (batch := next(stage.batches)) is None:
            futures.wait([stage.conversion])
        return weakref.ref(batch)

    gc.disable()
    try:
        kept = [take()() for _ in range(3)]
    finally:
        gc.enable()
    assert kept == [None] * 3


def test_the_oldest_unfinished_block_is_that_of_the_loop_not_of_the_threads() -> None:
    arguments: dict[str, Any] = {
        **{"batch_size": 4, "batch_format": "numpy"},
        **{"shuffle_buffer_size": 8, "shuffle_seed": 3},
    }
    blocks = [block(start, 4) for start in range(0, 80, 4)]
    plain = Pipeline(**arguments)
    bounds: list[int | None] = [0]
    bounds += [plain.oldest_unfinished for _ in feed(plain, blocks)]
    stage = collated(ids, ahead=6, **arguments)
    left = set(range(80))
    for number, batch in enumerate(drain(stage, blocks)):
        oldest = stage.oldest_unfinished
        assert oldest is not None
        # With this batch in hand, all blocks before the oldest are finished without it.
        assert oldest * 4 <= min(left)
        bound = bounds[number + 1]
        assert bound is not None
        assert oldest <= bound
        left -= set(batch)
    assert stage.oldest_unfinished == len(blocks)


def test_a_cheap_function_is_applied_where_a_batch_is_asked_for() -> None:
    here = threading.current_thread()
    where: list[threading.Thread] = []

    def convert(batch: Any) -> list[int]:
        where.append(threading.current_thread())
        return ids(batch)

    stage = Recipe("numpy", convert, in_loop=True).pipeline(ahead=1, batch_size=4)
    assert list(drain(stage, [block(0, 10)])) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert set(where) == {here}
    assert (stage.rows_out, stage.batches_out) == (10, 3)


def test_an_error_of_a_cheap_function_does_not_count_its_batch() -> None:
    stage = Recipe("numpy", lambda batch: 1 // int(batch["id"][0]), in_loop=True).pipeline(
        ahead=1, batch_size=5
    )
    batches = drain(stage, [block(-5, 5), block(0, 5), block(5, 5)])
    assert next(batches) == -1
    with pytest.raises(ZeroDivisionError):
        next(batches)
    assert (stage.rows_out, stage.batches_out) == (5, 1)
    assert list(stage.batches) == []


def test_a_shuffle_resumes_under_collation() -> None:
    arguments: dict[str, Any] = {
        **{"batch_size": 4, "batch_format": "numpy"},
        **{"shuffle_buffer_size": 8, "shuffle_seed": 3},
    }
    blocks = [block(start, 4) for start in range(0, 80, 4)]
    expected = list(map(ids, feed(Pipeline(**arguments), blocks)))
    for taken in (1, 5, 11):
        first = collated(ids, ahead=5, **arguments)
        batches = drain(first, blocks)
        for _ in range(taken):
            next(batches)
        # The last batch taken is still in the loop's hands.
        oldest, finished = first.oldest_unfinished, first.rows_out - 4
        first.close()
        assert oldest is not None
        second = collated(ids, ahead=5, **arguments)
        second.resume([4] * oldest, finished)
        assert list(drain(second, blocks[oldest:])) == expected[taken - 1 :]


def test_padding_counts_when_it_is_handed_out() -> None:
    stage = collated(ids, ahead=4)
    stage.add(block(0, 4), 0, 4)
    stage.add(block(0, 4), 0, 2, padding=True)
    stage.finish()
    batches = drain(stage, [])
    assert next(batches) == [0, 1, 2]
    assert stage.padded_rows == 0
    assert list(batches) == [[3, 0, 1]]
    assert stage.padded_rows == 2


class Arrow(ArrowBatchCollateFn):
    def __call__(self, batch: pa.Table) -> Any:
        return batch


class Numpy(NumpyBatchCollateFn):
    def __call__(self, batch: Any) -> Any:
        return batch


class Pandas(PandasBatchCollateFn):
    def __call__(self, batch: Any) -> Any:
        return batch


class Awaited(NumpyBatchCollateFn):
    async def __call__(self, batch: Any) -> Any:  # type: ignore[override]
        return batch


class Other(CollateFn[Any]):
    def __call__(self, batch: Any) -> Any:
        return batch


async def coroutine(batch: Any) -> Any:
    return batch


def test_the_format_of_the_input_follows_from_the_class() -> None:
    formats = [input_format(fn) for fn in (Arrow(), Numpy(), Pandas(), Other(), ids)]
    assert formats == ["pyarrow", "numpy", "pandas", "numpy", "numpy"]


@pytest.mark.parametrize(
    ("collate_fn", "says"),
    [
        (coroutine, "is a coroutine function"),
        (Awaited(), "is a coroutine function"),
        (Arrow, r"give an object of it, Arrow\(\)"),
        ("mean", "'mean' must be a function of a batch"),
    ],
)
def test_what_threads_cannot_call_is_refused(collate_fn: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        input_format(collate_fn)


def test_batches_of_pandas_blocks_become_arrow_only_if_asked_for() -> None:
    frame = block(0, 5).to_pandas()
    for kind, as_arrow in ((np.ndarray, False), (pa.ChunkedArray, True)):
        pipeline = Pipeline(batch_size=2, batch_format="numpy", pandas_as_arrow=as_arrow)
        assert {type(batch["id"]) for batch in feed(pipeline, [frame])} == {kind}
    pipeline = Pipeline(batch_size=4, batch_format="numpy", pandas_as_arrow=True)
    mixed = list(feed(pipeline, [block(0, 5), frame]))
    assert_same(mixed[1], {"id": mixed[1]["id"]})
    assert [type(batch) for batch in mixed] == [dict, dict, pa.Table]
