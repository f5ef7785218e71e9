"""Parts of one block, given to several consumers of one process."""

import asyncio

import pytest
import ray

import asyncsplit

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


async def test_consumers_of_one_process_share_blocks_without_losing_them() -> None:
    """Ray can lose a small object here, see `Feed`: asking again brings it back."""
    ds = ray.data.range(600, override_num_blocks=1)
    its = asyncsplit.streaming_split(ds, 3, equal=True)

    async def read(it: asyncsplit.AsyncDataIterator) -> int:
        async with asyncio.timeout(60):
            return sum([len(batch["id"]) async for batch in it.iter_batches(batch_size=None)])

    for _ in range(5):
        assert await asyncio.gather(*(read(it) for it in its)) == [200, 200, 200]
