"""However a loop is left, its split is released and nothing goes on producing."""

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import ray
from packaging.version import Version
from ray.actor import ActorHandle
from ray.data import Dataset

import asyncsplit
from asyncsplit import (
    AsyncDataIterator,
    CoordinatorLostError,
    SplitOptions,
    StreamClosedError,
)
from tests.integration.consume import eventually, read, read_epoch, stopped

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


def start_counter() -> Any:
    """Start an actor that counts blocks."""

    # Not at the top of the module, which the actor's process would import to find it. Its methods
    # are async, for Ray then calls them in any order: else they wait for a call that its task was
    # cancelled in.
    class Counter:
        def __init__(self) -> None:
            self.blocks = 0

        async def add(self) -> None:
            self.blocks += 1

        async def get(self) -> int:
            return self.blocks

    return ray.remote(Counter).options(num_cpus=0).remote()


BLOCK_BYTES = 2 * 2**20
BLOCKS = 40
"""Of a dataset of which few can have been produced by the time that a loop is left."""


async def settled(ask: Callable[[], Awaitable[int]]) -> int:
    """Return an answer once it has stayed the same for a hundred questions."""
    same, before = 0, None
    while same < 100:
        now = await ask()
        same = same + 1 if now == before else 0
        before = now
        await asyncio.sleep(0.01)
    assert before is not None
    return before


def counted(counter: "ActorHandle[Any]", blocks: int) -> Dataset:
    def produce(batch: Any) -> Any:
        ray.get(counter.add.remote())
        batch["payload"] = np.zeros((len(batch["id"]), BLOCK_BYTES // len(batch["id"])), np.uint8)
        return batch

    return ray.data.range(blocks * 4, override_num_blocks=blocks).map_batches(produce)


class Counting(NamedTuple):
    """Two splits of a dataset that counts the blocks it produces."""

    its: list[AsyncDataIterator]
    counter: Any

    async def produced(self) -> int:
        return int(await self.counter.get.remote())


@pytest.fixture(scope="module")
def counting(ray_cluster: None) -> Counting:
    counter = start_counter()
    options = SplitOptions(prefetch_bytes=BLOCK_BYTES)
    return Counting(
        asyncsplit.streaming_split(counted(counter, BLOCKS), 2, options=options), counter
    )


async def leave_by_break(it: AsyncDataIterator) -> None:
    async for _ in it.iter_batches(batch_size=1):
        break


async def leave_by_exception(it: AsyncDataIterator) -> None:
    async def loop() -> None:
        async for batch in it.iter_batches(batch_size=1):
            raise LookupError(batch)

    with pytest.raises(LookupError):
        await loop()


async def leave_by_cancellation(it: AsyncDataIterator) -> None:
    reading = asyncio.Event()

    async def loop() -> None:
        async for _ in it.iter_batches(batch_size=1):
            reading.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(loop())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_aclose(it: AsyncDataIterator) -> None:
    stream = it.iter_batches(batch_size=1)
    await anext(stream)
    await stream.aclose()
    with pytest.raises(StreamClosedError, match="call iter_batches"):
        await anext(stream)
    await stream.aclose()


async def leave_context(it: AsyncDataIterator) -> None:
    async with it.iter_batches(batch_size=1) as stream:
        await anext(stream)


async def leave_by_dropping(it: AsyncDataIterator) -> None:
    stream = it.iter_batches(batch_size=1)
    await anext(stream)
    del stream
    gc.collect()


async def leave_a_plain_loop(it: AsyncDataIterator) -> None:
    def loop() -> None:
        for _ in it.iter_batches(batch_size=1):
            break

    await asyncio.to_thread(loop)


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_exception,
        leave_by_cancellation,
        leave_by_aclose,
        leave_context,
        leave_by_dropping,
        leave_a_plain_loop,
    ],
)
async def test_leaving_early_stops_the_executor(leave: Any, counting: Counting) -> None:
    before = await counting.produced()
    await asyncio.gather(*(leave(it) for it in counting.its))
    await eventually(lambda: stopped(counting.its[0]))
    assert await counting.produced() - before < BLOCKS
    assert (await counting.its[0].status()).held_bytes == 0
    shares = [len(ids) for ids in await read_epoch(counting.its)]
    assert shares == [2 * BLOCKS, 2 * BLOCKS], "and the next epoch is whole"


async def test_one_split_leaving_early_does_not_change_the_others_share() -> None:
    ds = ray.data.range(1000, override_num_blocks=10)
    first, second = asyncsplit.streaming_split(ds, 2)
    _, ids = await asyncio.gather(leave_by_break(first), read(second))
    assert len(ids) == 500


async def test_a_paused_consumer_stops_production() -> None:
    blocks, share, prefetch = 80, 20, 4
    counter = start_counter()
    ds = counted(counter, blocks)
    ds.context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=share * BLOCK_BYTES
    )
    options = SplitOptions(prefetch_bytes=prefetch * BLOCK_BYTES)
    (it,) = asyncsplit.streaming_split(ds, 1, options=options)
    # Ray 2.56 does not count what consumers hold.
    uncounted = prefetch + 1 if Version(ray.__version__) < Version("2.58") else 0
    async with it.iter_batches(batch_size=4) as stream:
        await anext(stream)

        assert await settled(counter.get.remote) <= share / 2 + uncounted
        assert sum([len(batch["id"]) async for batch in stream]) == blocks * 4 - 4


@pytest.mark.parametrize("equal", [True, False])
async def test_a_budget_smaller_than_a_block_still_makes_progress(equal: bool) -> None:
    ds = ray.data.range(1000, override_num_blocks=10)
    options = SplitOptions(prefetch_bytes=1)
    its = asyncsplit.streaming_split(ds, 2, equal=equal, options=options)
    for batch_size in (1, 150, None):
        epoch = await read_epoch(its, batch_size=batch_size)
        assert sorted(epoch[0] + epoch[1]) == list(range(1000))


async def test_shutdown_ends_open_streams_with_an_error() -> None:
    ds = ray.data.range(20_000, override_num_blocks=20)
    first, second = asyncsplit.streaming_split(ds, 2, options=SplitOptions(prefetch_bytes=1))
    async with first.iter_batches() as one, second.iter_batches() as two:
        await asyncio.gather(anext(one), anext(two))
        await first.shutdown()
        with pytest.raises(StreamClosedError, match="shut down"):
            async for _ in one:
                pass
    with pytest.raises(StreamClosedError, match="create a new one"):
        await read(second)


async def unreachable(url: str) -> bool:
    parts = urlsplit(url)
    try:
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError:
        return True
    writer.close()
    return False


@pytest.mark.parametrize("reading", [False, True])
async def test_the_coordinator_ends_with_the_last_iterator(reading: bool) -> None:
    ds = ray.data.range(1000, override_num_blocks=10)
    its = asyncsplit.streaming_split(ds, 2, options=SplitOptions(prefetch_bytes=1))
    url = await its[0].metrics_url()
    assert url is not None
    if reading:
        await asyncio.gather(*(leave_by_dropping(it) for it in its))
    del its
    gc.collect()
    await eventually(lambda: unreachable(url))


async def test_killing_the_coordinator_is_an_error_that_says_so() -> None:
    ds = ray.data.range(20_000, override_num_blocks=20)
    (it,) = asyncsplit.streaming_split(ds, 1, options=SplitOptions(prefetch_bytes=1))
    async with it.iter_batches() as stream:
        await anext(stream)
        ray.kill(it._consumer.coordinator)
        with pytest.raises(CoordinatorLostError, match="Create a new split"):
            async for _ in stream:
                pass
    with pytest.raises(CoordinatorLostError):
        await it.schema()


async def test_nothing_is_left_when_the_driver_shuts_ray_down() -> None:
    script = """
import asyncio, sys, ray, asyncsplit
ray.init(address=sys.argv[1], log_to_driver=False)
async def main():
    its = asyncsplit.streaming_split(ray.data.range(10_000, override_num_blocks=10), 2)
    streams = [it.iter_batches(batch_size=1) for it in its]
    await asyncio.gather(*(anext(stream) for stream in streams))
    print(await its[0].metrics_url(), flush=True)
    ray.shutdown()  # what is dropped after it must not start another Ray to say so
asyncio.run(main())
sys.exit(ray.is_initialized())
"""
    address = ray.get_runtime_context().gcs_address
    driver = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        address,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert driver.stdout is not None
    url = (await driver.stdout.readline()).decode().strip()
    assert url.startswith("http://"), (await driver.communicate())[1].decode()
    _, err = await driver.communicate()
    assert b"never retrieved" not in err
    assert b"was destroyed" not in err
    assert driver.returncode == 0, err.decode()
    await eventually(lambda: unreachable(url))
