"""However a job ends, nothing of its splits stays: no process, no running task, no block."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import ray
from ray.data import Dataset

import asyncsplit
from asyncsplit import AsyncDataIterator, SplitOptions
from tests.integration.consume import eventually, stopped
from tests.integration.processes import runs

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]

Free = Callable[[], Awaitable[bool]]

BLOCK_BYTES = 2**20
HELD_BYTES = 8 * BLOCK_BYTES


def long_epoch() -> Dataset:
    """Return a dataset that is not at its end while somebody stands at the first batch."""

    def produce(batch: Any) -> Any:
        return {"id": batch["id"], "payload": np.zeros((1, BLOCK_BYTES), np.uint8)}

    return ray.data.range(500, override_num_blocks=500).map_batches(produce)


def split_in_two(ds: Dataset) -> list[AsyncDataIterator]:
    return asyncsplit.streaming_split(ds, 2, options=SplitOptions(prefetch_bytes=HELD_BYTES))


def free() -> dict[str, float]:
    """Return what the cluster has free: CPUs, and bytes of its object store."""
    available = ray.available_resources()
    return {name: available.get(name, 0) for name in ("CPU", "object_store_memory")}


@pytest_asyncio.fixture
async def all_free() -> AsyncIterator[Free]:
    """Return a function that tells whether all is free that was free before the test."""
    gc.collect()
    cpus = ray.cluster_resources()["CPU"]

    async def idle() -> bool:
        return bool(free()["CPU"] == cpus)

    await eventually(idle)
    before = free()

    async def as_before() -> bool:
        return all(now >= before[name] for name, now in free().items())

    yield as_before


class Reader:
    """Stands at the first batch of a split."""

    def __init__(self, it: AsyncDataIterator) -> None:
        self._stream = it.iter_batches(batch_size=1)

    async def begin(self) -> int:
        await anext(self._stream)
        return os.getpid()


async def start_readers(its: list[AsyncDataIterator]) -> tuple[list[Any], list[int]]:
    """Return actors that read, and their processes."""
    readers: list[Any] = [ray.remote(Reader).options(num_cpus=0).remote(it) for it in its]
    return readers, list(await asyncio.gather(*(reader.begin.remote() for reader in readers)))


def kill(readers: list[Any]) -> None:
    while readers:
        ray.kill(readers.pop())


async def holding(all_free: Free) -> None:
    """Return once blocks are held, so that there is something to let go of."""

    async def held() -> bool:
        return not await all_free()

    await eventually(held)


async def nothing_is_left(pids: list[int], all_free: Free) -> None:
    async def gone() -> bool:
        return not any(map(runs, pids))

    # Ray gives an actor that is in a call 5 s to end by itself.
    await eventually(gone, timeout_s=40)
    await eventually(all_free, timeout_s=40)


async def test_killed_consumers_and_dropped_iterators_leave_nothing(all_free: Free) -> None:
    its = split_in_two(long_epoch())
    readers, pids = await start_readers(its)
    pids.append((await its[0].status()).pid)
    await holding(all_free)
    kill(readers)
    del its
    gc.collect()
    await nothing_is_left(pids, all_free)


async def test_killed_consumers_whose_iterators_stay_leave_nothing(all_free: Free) -> None:
    """The coordinator stays as well, but not what it held when `rejoin_timeout_s` was over."""
    options = SplitOptions(prefetch_bytes=HELD_BYTES, rejoin_timeout_s=1)
    its = asyncsplit.streaming_split(long_epoch(), 2, options=options)
    readers, pids = await start_readers(its)
    await holding(all_free)
    kill(readers)
    await eventually(lambda: stopped(its[0]))
    await nothing_is_left(pids, all_free)


async def test_dropped_consumers_and_iterators_leave_nothing(all_free: Free) -> None:
    its = split_in_two(long_epoch())
    readers, pids = await start_readers(its)
    pids.append((await its[0].status()).pid)
    await holding(all_free)
    del its, readers
    gc.collect()
    await nothing_is_left(pids, all_free)


async def test_a_shutdown_while_all_read_leaves_nothing(all_free: Free) -> None:
    its = split_in_two(long_epoch())
    readers, pids = await start_readers(its)
    await holding(all_free)
    await its[0].shutdown()
    assert not (await its[0].status()).executing
    # What the consumers have fetched is theirs.
    kill(readers)
    await nothing_is_left(pids, all_free)


DRIVER = """
import asyncio, sys, ray
from tests.integration.test_teardown import long_epoch, split_in_two, start_readers

async def main(end):
    here, there = split_in_two(long_epoch())
    stream = here.iter_batches(batch_size=1)
    _, (readers, pids) = await asyncio.gather(anext(stream), start_readers([there]))
    print((await here.status()).pid, *pids, flush=True)
    async for batch in stream:  # soon waits, because the other split goes no further
        if end == "return":
            return

ray.init(address=sys.argv[1], log_to_driver=False)
asyncio.run(main(sys.argv[2]))
"""


@pytest.mark.parametrize("end", ["return", "SIGINT", "SIGKILL"])
async def test_a_driver_that_ends_in_an_epoch_leaves_nothing(end: str, all_free: Free) -> None:
    driver = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        DRIVER,
        ray.get_runtime_context().gcs_address,
        end,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert driver.stdout is not None
    pids = list(map(int, (await driver.stdout.readline()).split()))
    assert pids, (await driver.communicate())[1].decode()
    if end != "return":
        await holding(all_free)
        driver.send_signal(signal.Signals[end])
    _, err = await driver.communicate()
    assert (b"KeyboardInterrupt" in err) == (end == "SIGINT"), err.decode()
    assert (driver.returncode == 0) == (end == "return"), err.decode()
    assert b"never retrieved" not in err
    assert b"was destroyed" not in err
    await nothing_is_left(pids, all_free)
