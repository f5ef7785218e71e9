"""Rows per split and epoch, the barrier, and who may consume what."""

import asyncio
import contextlib
import gc
from itertools import chain
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.data import Dataset
from ray.data.expressions import col

import asyncsplit
from asyncsplit import AsyncDataIterator, ConsumerConflictError, SplitOptions
from tests.integration.consume import Drive, eventually, read, read_epoch

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]

DRIVES: tuple[Drive, ...] = ("async", "sync")


def thousand(blocks: int = 10) -> Dataset:
    return ray.data.range(1000, override_num_blocks=blocks)


@pytest.fixture(scope="module")
def single(ray_cluster: None) -> AsyncDataIterator:
    """Return the only split of a dataset, for tests that leave it free."""
    (it,) = asyncsplit.streaming_split(thousand(), 1)
    return it


@pytest.fixture(scope="module")
def pair(ray_cluster: None) -> list[AsyncDataIterator]:
    """Return two splits of a dataset, for tests that leave them free, and in the same epoch."""
    return asyncsplit.streaming_split(thousand(), 2)


async def test_equal_splits_repeat_for_each_epoch() -> None:
    its = asyncsplit.streaming_split(thousand(), 2, equal=True)
    for drive in DRIVES * 2:
        epoch = await read_epoch(its, drive)
        assert [len(ids) for ids in epoch] == [500, 500]
        assert sorted(chain(*epoch)) == list(range(1000))


@pytest.mark.parametrize(("equal", "expected"), [(True, [0, 0]), (False, [0, 1])])
async def test_one_row_over_two_splits(equal: bool, expected: list[int]) -> None:
    its = asyncsplit.streaming_split(ray.data.range(1), 2, equal=equal)
    for drive in DRIVES:
        assert sorted(len(ids) for ids in await read_epoch(its, drive)) == expected


@pytest.mark.parametrize(("equal", "expected"), [(True, [333, 333, 333]), (False, [300, 300, 400])])
async def test_ten_blocks_over_three_splits(equal: bool, expected: list[int]) -> None:
    its = asyncsplit.streaming_split(thousand(), 3, equal=equal)
    for drive in DRIVES:
        epoch = await read_epoch(its, drive)
        assert sorted(len(ids) for ids in epoch) == expected
        rows = list(chain(*epoch))
        assert len(set(rows)) == len(rows)


async def test_padded_splits_get_every_row_and_as_many_batches() -> None:
    """In order, shuffled and row by row; and the last rows of a loop are those that repeat."""
    its = asyncsplit.streaming_split(thousand(), 3, equal="pad")
    shuffle: dict[str, Any] = {"local_shuffle_buffer_size": 50, "batch_size": 30}

    async def evaluate(it: AsyncDataIterator) -> tuple[list[int], int]:
        ids: list[int] = []
        stream = it.iter_batches(batch_size=100)
        async for batch in stream:
            ids += batch["id"].tolist()
        return ids, stream.statistics().padded_rows

    shares = await asyncio.gather(*map(evaluate, its))
    assert [len(ids) for ids, _ in shares] == [334] * 3
    own = [ids[: len(ids) - padded] for ids, padded in shares]
    assert sorted(chain(*own)) == list(range(1000))
    for arguments in (shuffle, {**shuffle, "drop_last": True}):
        streams = [it.iter_batches(**arguments) for it in its]

        async def batches(stream: Any) -> list[Any]:
            return [batch["id"] async for batch in stream]

        got = await asyncio.gather(*map(batches, streams))
        dropped = 334 % 30 if "drop_last" in arguments else 0
        assert [sum(map(len, ids)) for ids in got] == [334 - dropped] * 3
        assert len({len(ids) for ids in got}) == 1
        if not dropped:
            assert {i for ids in got for batch in ids for i in batch} == set(range(1000))
            assert sum(stream.statistics().padded_rows for stream in streams) == 2
    rows = await asyncio.gather(*(count_rows(it) for it in its))
    assert rows == [334] * 3
    assert "8 padded" in await its[0].stats(), "in four epochs"


async def count_rows(it: AsyncDataIterator) -> int:
    return len([row async for row in it.iter_rows()])


@pytest.mark.parametrize(("rows", "n"), [(0, 3), (1, 2), (3, 8), (5, 1)])
async def test_padding_few_rows(rows: int, n: int) -> None:
    ds = thousand(2).filter(expr=col("id") < rows)
    epoch = await read_epoch(asyncsplit.streaming_split(ds, n, equal="pad"))
    assert [len(ids) for ids in epoch] == [-(-rows // n)] * n
    assert set(chain(*epoch)) == set(range(rows))


async def test_demand_delivers_every_row_once() -> None:
    options = SplitOptions(routing="demand")
    ds = thousand(20).map_batches(lambda batch: batch)
    ds.context.execution_options.preserve_order = True
    epoch = await read_epoch(asyncsplit.streaming_split(ds, 3, options=options))
    assert sorted(chain(*epoch)) == list(range(1000))
    assert all(ids == sorted(ids) for ids in epoch), "each split's in the dataset's order"


async def test_demand_lets_the_fast_go_on_while_one_does_not_read() -> None:
    options = SplitOptions(routing="demand")
    fast, slow = asyncsplit.streaming_split(thousand(20), 2, options=options)
    async with slow.iter_batches(batch_size=None) as paused:
        first, ids = await asyncio.gather(anext(paused), read(fast))
        rest = [batch["id"] async for batch in paused]
    assert sorted(chain(first["id"], ids, *rest)) == list(range(1000))
    assert len(ids) > 800


async def test_an_empty_dataset_gives_empty_epochs() -> None:
    its = asyncsplit.streaming_split(thousand().filter(expr=col("id") < 0), 2)
    assert await read_epoch(its) == [[], []]
    assert await read_epoch(its) == [[], []]


async def test_more_splits_than_rows() -> None:
    its = asyncsplit.streaming_split(ray.data.range(3, override_num_blocks=1), 8, equal=True)
    assert [len(ids) for ids in await read_epoch(its)] == [0] * 8
    its = asyncsplit.streaming_split(ray.data.range(3, override_num_blocks=3), 8)
    assert sorted(chain(*await read_epoch(its))) == [0, 1, 2]


async def test_an_epoch_waits_until_all_have_arrived(pair: list[AsyncDataIterator]) -> None:
    first, second = pair
    waiting = asyncio.create_task(read(first))
    await asyncio.wait({waiting}, timeout=0.5)
    assert not waiting.done()
    ids = await read(second)
    assert sorted(ids + await waiting) == list(range(1000))


async def test_a_split_may_finish_before_the_others_read_on() -> None:
    first, second = asyncsplit.streaming_split(thousand(), 2, equal=True)
    async with second.iter_batches(batch_size=100) as slow:
        _, ids = await asyncio.gather(anext(slow), read(first))
        assert len(ids) == 500
        next_epoch = asyncio.create_task(read(first))
        rest = [batch async for batch in slow]
        assert sum(len(batch["id"]) for batch in rest) == 400
    ids = await read(second)
    assert sorted(ids + await next_epoch) == list(range(1000))


async def test_order_within_a_split_follows_the_dataset() -> None:
    ds = thousand(20).map_batches(lambda batch: batch, batch_size=7)
    ds.context.execution_options.preserve_order = True
    for equal in (True, False):
        its = asyncsplit.streaming_split(ds, 3, equal=equal)
        for ids in await read_epoch(its):
            assert ids == sorted(ids)


async def test_order_is_kept_inside_bundles_of_several_blocks() -> None:
    ds = thousand(40)
    ds.context.execution_options.preserve_order = True
    its = asyncsplit.streaming_split(ds.repartition(3), 1)
    (ids,) = await read_epoch(its)
    assert ids == list(range(1000))


async def test_an_intruder_gets_an_error_and_harms_nobody(single: AsyncDataIterator) -> None:
    intruder = cloudpickle.loads(cloudpickle.dumps(single))
    async with single.iter_batches(batch_size=100) as rightful:
        ids = (await anext(rightful))["id"].tolist()
        with pytest.raises(ConsumerConflictError, match="split 0 is already being consumed"):
            await read(intruder)
        async for batch in rightful:
            ids += batch["id"].tolist()
    assert sorted(ids) == list(range(1000))
    assert len(await read(intruder)) == 1000, "the split is free once its consumer is done"


async def test_an_intruder_at_the_barrier_gets_an_error(pair: list[AsyncDataIterator]) -> None:
    first, second = pair
    copies = [cloudpickle.loads(cloudpickle.dumps(first)) for _ in range(2)]
    waiting = [asyncio.create_task(read(it)) for it in copies]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(ConsumerConflictError):
        done.pop().result()
    ids = await read(second)
    (rightful,) = [task for task in waiting if not task.done() or not task.exception()]
    assert sorted(ids + await rightful) == list(range(1000))


async def test_a_stream_that_only_a_full_collection_finds_is_not_in_the_way() -> None:
    (it,) = asyncsplit.streaming_split(ray.data.range(100), 1)

    async def leave() -> None:
        error = LookupError()  # whose traceback has this frame, and the frame the stream
        async for _ in it.iter_batches(batch_size=1):
            gc.collect()  # as happens during a long loop
            raise error

    with contextlib.suppress(LookupError):
        await leave()
    assert len(await read(it)) == 100


async def test_two_streams_of_one_iterator_at_a_time_are_refused(single: AsyncDataIterator) -> None:
    async with single.iter_batches(batch_size=100) as stream:
        await anext(stream)
        with pytest.raises(ConsumerConflictError, match="another stream of this iterator"):
            await read(single)
        assert sum([len(batch["id"]) async for batch in stream]) == 900


async def test_two_tasks_on_one_stream_are_refused(pair: list[AsyncDataIterator]) -> None:
    first, second = pair
    async with first.iter_batches() as stream:

        async def is_open() -> bool:
            return stream.is_open

        waiting = asyncio.create_task(anext(stream))
        await eventually(is_open)
        with pytest.raises(ConsumerConflictError, match="one stream serves one loop"):
            await anext(stream)
        await asyncio.gather(waiting, read(second))


async def test_a_stream_that_ended_begins_the_next_epoch(single: AsyncDataIterator) -> None:
    stream = single.iter_batches(batch_size=None)
    epochs = []
    for _ in range(2):
        assert sum([len(batch["id"]) async for batch in stream]) == 1000
        epochs.append(stream.statistics().epoch)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    first, second = epochs
    assert first is not None
    assert second == first + 1


async def test_rows_are_dicts(single: AsyncDataIterator) -> None:
    assert sorted([row["id"] async for row in single.iter_rows()]) == list(range(1000))


async def test_a_single_consumer_needs_no_split() -> None:
    ids = [i async for batch in asyncsplit.iter_batches(thousand()) for i in batch["id"]]
    assert sorted(ids) == list(range(1000))


async def test_in_real_actors() -> None:
    class Worker:
        async def ids(self, it: AsyncDataIterator) -> list[int]:
            return await read(it)

    its = asyncsplit.streaming_split(thousand(), 2, equal=True)
    workers: list[Any] = [ray.remote(Worker).options(num_cpus=0).remote() for _ in its]
    for _ in range(2):
        epoch = await asyncio.gather(
            *(worker.ids.remote(it) for worker, it in zip(workers, its, strict=True))
        )
        assert sorted(chain(*epoch)) == list(range(1000))
