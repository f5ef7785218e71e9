"""Several consumers share a split: same batches, each at its own pace and with its own fate."""

import asyncio
import os
import signal
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.data import Dataset

import asyncsplit
from asyncsplit import AsyncDataIterator, ConsumerConflictError, SplitOptions
from tests.integration.consume import read, read_epoch

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]

TWO = SplitOptions(replicas=2)


def thousand() -> Dataset:
    ds = ray.data.range(1000, override_num_blocks=10)
    ds.context.execution_options.preserve_order = True
    return ds


def where(it: AsyncDataIterator) -> tuple[int, int, int]:
    return it.split_index, it.replica_index, it.world_size()


async def test_replicas_get_the_same_batches_and_leave_on_their_own() -> None:
    its = asyncsplit.streaming_split(thousand(), 2, equal=True, options=TWO)
    assert [*map(where, its)] == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    a, b, c, d = await read_epoch(its, local_shuffle_buffer_size=100, batch_size=10)
    assert (a, c) == (b, d), "also in an order that nobody has given a seed for"
    assert a != sorted(a)
    assert sorted(a + c) == list(range(1000))

    async def leave() -> list[int]:
        async with its[1].iter_batches(batch_size=10) as stream:
            return (await anext(stream))["id"].tolist()  # type: ignore[no-any-return]

    a, b, c, d = await asyncio.gather(read(its[0]), leave(), read(its[2]), read(its[3]))
    assert (b, d) == (a[:10], c)
    assert sorted(a + c) == list(range(1000))
    copy = cloudpickle.loads(cloudpickle.dumps(its[3]))
    assert where(copy) == (1, 1, 2)
    async with its[3].iter_batches() as stream:
        waiting = asyncio.create_task(read_epoch(its[:3]))
        await anext(stream)
        with pytest.raises(ConsumerConflictError, match="replica 1 of split 1 is already"):
            await read(copy)
        assert [len(ids) for ids in await waiting] == [500] * 3


async def test_replicas_differ_in_nothing_or_get_an_error() -> None:
    first, second = asyncsplit.streaming_split(thousand(), 1, options=TWO)
    outcomes = await asyncio.gather(
        read(first, local_shuffle_buffer_size=100), read(second), return_exceptions=True
    )
    assert all("replicas of split 0 have to see the same" in str(error) for error in outcomes)
    assert await read_epoch([first, second]) == [list(range(1000))] * 2


async def test_a_replica_and_the_coordinator_are_replaced(start: Any) -> None:
    options = SplitOptions(replicas=2, prefetch_bytes=1)
    its = asyncsplit.streaming_split(thousand(), 1, options=options)
    victim = start(its[1], local_shuffle_buffer_size=100)
    ids: list[int] = []
    async with its[0].iter_batches(batch_size=10, local_shuffle_buffer_size=100) as stream:
        for _ in range(8):
            got, batch = await asyncio.gather(victim.next.remote(), anext(stream))
            ids += batch["id"].tolist()
            assert got == batch["id"].tolist()
        os.kill(await victim.pid.remote(), signal.SIGKILL)
        with pytest.raises(ValueError, match=r"buffer_size=100 .* and for .*buffer_size=200"):
            await start(its[1], local_shuffle_buffer_size=200).rest.remote()
        rest = start(its[1], local_shuffle_buffer_size=100).rest.remote()
        async for batch in stream:
            if len(ids) == 500:
                os.kill((await its[0].status()).pid, signal.SIGKILL)
            ids += batch["id"].tolist()
    assert sorted(ids) == list(range(1000))
    again = await rest
    assert again == ids[-len(again) :], "in the order that the others have had"
    assert len(again) >= 920, "from its own first uncommitted row"
