"""Epochs that are started before all have arrived, because it is known that they come."""

import asyncio
import os
import signal
from itertools import chain
from typing import Any

import pytest
import ray
from ray import cloudpickle

import asyncsplit
from asyncsplit import (
    AsyncDataIterator,
    ConsumerConflictError,
    ExecutionActiveError,
    SplitOptions,
    StreamClosedError,
)
from tests.integration.consume import Drive, Reader, eventually, read, read_epoch, stopped

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


def splits(n: int, epochs: int | None, **options: Any) -> list[AsyncDataIterator]:
    dataset = ray.data.range(1000, override_num_blocks=10)
    return asyncsplit.streaming_split(dataset, n, options=SplitOptions(epochs=epochs, **options))


async def has_blocks(it: AsyncDataIterator) -> bool:
    status = await it.status()
    return not status.committed_rows[0] and status.held_bytes == 8 * 1000


async def test_the_next_epochs_blocks_are_there_before_anybody_arrives() -> None:
    its = splits(2, epochs=3)
    for epoch in range(3):
        assert sorted(chain(*await read_epoch(its))) == list(range(1000))
        if epoch < 2:
            await eventually(lambda: has_blocks(its[0]))
    await eventually(lambda: stopped(its[0]))


async def test_a_further_epoch_starts_when_all_have_arrived() -> None:
    its = splits(2, epochs=1)
    for _ in range(2):
        assert sorted(chain(*await read_epoch(its))) == list(range(1000))
        await eventually(lambda: stopped(its[0]))


async def test_what_is_held_ahead_stays_within_the_budget() -> None:
    its = splits(2, epochs=2, prefetch_bytes=800)
    await read_epoch(its)

    async def full() -> bool:
        return (await its[0].status()).held_bytes >= 2 * 800

    await eventually(full)
    assert (await its[0].status()).held_bytes <= 2 * (800 + 800)
    assert sorted(chain(*await read_epoch(its))) == list(range(1000))


async def test_shutting_down_between_epochs_leaves_nothing() -> None:
    its = splits(1, epochs=2)
    await read(its[0])
    await eventually(lambda: has_blocks(its[0]))
    await its[0].shutdown()
    status = await its[0].status()
    assert (status.executing, status.held_bytes) == (False, 0)
    with pytest.raises(StreamClosedError, match="was shut down"):
        await read(its[0])


async def arrived_early(*its: AsyncDataIterator) -> bool:
    earlies = [it._consumer._early for it in its]
    return all(early is not None and early.answer.done() for early in earlies)


async def test_the_first_blocks_of_a_known_epoch_need_no_coordinator() -> None:
    dataset = ray.data.range(1000, override_num_blocks=2).materialize()
    (it,) = asyncsplit.streaming_split(dataset, 1, options=SplitOptions(epochs=2))
    assert await read(it) == list(range(1000))
    await eventually(lambda: arrived_early(it))
    coordinator = (await it.status()).pid
    os.kill(coordinator, signal.SIGSTOP)
    try:
        stream = it.iter_batches(batch_size=100)
        async with asyncio.timeout(20):
            batch = await anext(stream)
    finally:
        os.kill(coordinator, signal.SIGCONT)
    ids = batch["id"].tolist()
    ids += [i async for batch in stream for i in batch["id"].tolist()]
    assert ids == list(range(1000))


async def test_schema_between_known_epochs_is_that_of_the_first_block() -> None:
    dataset = ray.data.range(1000, override_num_blocks=10).map_batches(lambda batch: batch)
    options = SplitOptions(epochs=2, prefetch_bytes=1)
    (it,) = asyncsplit.streaming_split(dataset, 1, options=options)
    await read(it)
    await eventually(lambda: arrived_early(it))
    for during_execution in ("raise", "wait"):
        async with asyncio.timeout(20):
            schema = await it.schema(during_execution=during_execution)
        assert schema is not None
        assert schema.names == ["id"]
    status = await it.status()
    assert status.executing
    assert status.schema_requests == {"hit": 0, "miss": 0, "observed": 2, "rejected": 0}
    stream = it.iter_batches(batch_size=10)
    await anext(stream)
    with pytest.raises(ExecutionActiveError):
        await it.schema()
    rest = [i async for batch in stream for i in batch["id"].tolist()]
    assert sorted(rest) == [i for i in range(1000) if i >= 10]


async def test_whoever_drops_its_iterator_leaves_the_known_epoch_to_others() -> None:
    its = splits(2, epochs=3)
    copies = [cloudpickle.loads(cloudpickle.dumps(its[0])) for _ in range(2)]
    second = copies.pop()
    await read_epoch([copies[0], its[1]])
    await eventually(lambda: arrived_early(*copies, its[1]))
    with pytest.raises(ConsumerConflictError, match="drop the other iterator first"):
        await read(second)
    copies.clear()
    assert sorted(chain(*await read_epoch([second, its[1]]))) == list(range(1000))
    copy = cloudpickle.loads(cloudpickle.dumps(second))  # who sends one leaves the split to it
    assert sorted(chain(*await read_epoch([copy, its[1]]))) == list(range(1000))


@pytest.mark.parametrize("drive", ["async", "sync"])
async def test_a_known_epoch_may_be_shuffled_unlike_the_one_before(drive: Drive) -> None:
    its = splits(2, epochs=3)
    for seed in (None, 5, None):
        size = None if seed is None else 100
        ids = await read_epoch(its, drive, local_shuffle_buffer_size=size, local_shuffle_seed=seed)
        assert sorted(chain(*ids)) == list(range(1000))
        assert (ids[0] == sorted(ids[0])) == (seed is None)


async def test_who_ends_between_known_epochs_did_not_die() -> None:
    its = splits(2, epochs=3, rejoin_timeout_s=0.5)
    workers: list[Any] = [ray.remote(Reader).options(num_cpus=0).remote(it) for it in its]
    ids = await asyncio.gather(*(worker.rest.remote() for worker in workers))
    assert sorted(chain(*ids)) == list(range(1000))

    async def reads() -> bool:
        return (await its[0].status()).epoch == 1

    await eventually(reads)
    for worker in workers:
        ray.kill(worker)
    assert sorted(chain(*await read_epoch(its))) == list(range(1000))
    coordinator: Any = its[0].coordinator
    assert await coordinator.__ray_call__.remote(lambda actor: actor._state.deaths) == 0


async def test_an_epoch_left_early_starts_none_ahead() -> None:
    its = splits(1, epochs=2, prefetch_bytes=1)
    async with its[0].iter_batches(batch_size=10) as stream:
        await anext(stream)
    await eventually(lambda: stopped(its[0]))
    assert sorted(await read(its[0])) == list(range(1000))


async def test_the_first_to_arrive_has_the_next_epoch_started_which_makes_way_for_schema() -> None:
    dataset = ray.data.range(1000, override_num_blocks=10).map_batches(lambda batch: batch)
    its = asyncsplit.streaming_split(dataset, 2)
    await read_epoch(its)
    await eventually(lambda: stopped(its[0]))
    first = asyncio.create_task(read(its[0]))
    await eventually(lambda: has_blocks(its[1]))
    schema = await its[1].schema()
    assert schema is not None
    assert schema.names == ["id"]
    await eventually(lambda: has_blocks(its[1]))
    status = await its[1].status()
    assert status.schema_requests == {"hit": 0, "miss": 1, "observed": 0, "rejected": 0}
    assert sorted([*await read(its[1]), *await first]) == list(range(1000))

    async with its[0].iter_batches() as stream:
        waits = asyncio.create_task(anext(stream))
        await eventually(lambda: has_blocks(its[1]))
        waits.cancel()
        await asyncio.wait({waits})

    async def gone() -> bool:
        status = await its[1].status()
        return not status.executing and status.held_bytes == 0

    await eventually(gone)
    assert sorted(chain(*await read_epoch(its))) == list(range(1000))


async def test_an_error_of_the_next_epoch_is_raised_there() -> None:
    epochs: Any = ray.remote(Epochs).options(num_cpus=0).remote()

    def fail_in_the_second(batch: Any) -> Any:
        if int(ray.get(epochs.begun.remote())) > 1:
            raise ValueError("spoilt")
        return batch

    dataset = ray.data.range(10, override_num_blocks=1).map_batches(fail_in_the_second)
    (it,) = asyncsplit.streaming_split(dataset, 1, options=SplitOptions(epochs=2))
    assert await read(it) == list(range(10))
    with pytest.raises(ValueError, match="spoilt"):
        await read(it)


class Epochs:
    def __init__(self) -> None:
        self._begun = 0

    def begun(self) -> int:
        self._begun += 1
        return self._begun
