"""Ways to read splits, shared by the integration tests."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from asyncsplit import AsyncDataIterator

Drive = Literal["async", "sync"]


async def read(it: AsyncDataIterator, drive: Drive = "async", **kwargs: Any) -> list[int]:
    """Return the ids of one epoch of one split, in order; no epoch here takes 45 s."""
    bound = asyncio.timeout(45)
    try:
        async with bound:
            return await _read(it, drive, **kwargs)
    except TimeoutError as error:
        if bound.expired():
            raise AssertionError(f"split {it.split_index} hangs: {await it.status()}") from error
        raise


async def _read(it: AsyncDataIterator, drive: Drive, **kwargs: Any) -> list[int]:
    if drive == "sync":
        return await asyncio.to_thread(_read_sync, it, **kwargs)
    ids: list[int] = []
    async for batch in it.iter_batches(**kwargs):
        ids += batch["id"].tolist()
    return ids


async def read_epoch(
    its: Sequence[AsyncDataIterator], drive: Drive = "async", **kwargs: Any
) -> list[list[int]]:
    """Return the ids of one epoch, for each split."""
    return await asyncio.gather(*(read(it, drive, **kwargs) for it in its))


def _read_sync(it: AsyncDataIterator, **kwargs: Any) -> list[int]:
    ids: list[int] = []
    for batch in it.iter_batches(**kwargs):
        ids += batch["id"].tolist()
    return ids


class Reader:
    """Consumes a split in a process of its own, one batch per call."""

    def __init__(self, it: AsyncDataIterator, batch_size: int = 10, **kwargs: Any) -> None:
        self._it = it
        self._stream = it.iter_batches(batch_size=batch_size, **kwargs)

    def pid(self) -> int:
        return os.getpid()

    async def next(self) -> list[int]:
        """Return the next batch's ids; those of the batch before are then committed."""
        try:
            return list(map(int, (await anext(self._stream))["id"]))
        except StopAsyncIteration:
            return []

    def epoch(self) -> int | None:
        """Return the epoch being read, once it has started."""
        return self._stream.statistics().epoch

    def state(self) -> dict[str, Any]:
        return self._it.state_dict()

    async def rest(self) -> list[int]:
        return [int(i) async for batch in self._stream for i in batch["id"]]


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 20) -> None:
    """Return once the condition holds; it is asked again after each answer."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - the condition is in another process
            await asyncio.sleep(0.01)


async def stopped(it: AsyncDataIterator) -> bool:
    """Tell whether the split's epoch is over and its executor stopped."""
    status = await it.status()
    return status.phase == "waiting" and not status.executing
