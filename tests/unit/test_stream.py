"""What a stream that is never out of batches leaves to the rest of its event loop."""

import asyncio
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from asyncsplit import stream as module
from asyncsplit.consumer import Consumer
from asyncsplit.pipeline import Pipeline
from asyncsplit.stream import YIELD_AFTER_S, BatchStream

BATCHES = 1000
PER_TURN = 16
"""Batches for which a stream may keep the loop, with the clock of these tests."""


@pytest.fixture(autouse=True)
def _looking_at_the_clock_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(range(100 * BATCHES))
    monkeypatch.setattr(module, "perf_counter", lambda: next(looks) * YIELD_AFTER_S / PER_TURN)


def full_stream() -> BatchStream[Any]:
    pipeline = Pipeline(batch_size=1, batch_format="numpy")
    pipeline.add(pa.table({"id": np.arange(BATCHES)}), 0, BATCHES)
    pipeline.finish()
    nobody: Any = None
    return BatchStream(Consumer(nobody, 0, 0), lambda: pipeline, prefetch_batches=1, batch_size=1)


@pytest.mark.asyncio
async def test_streams_in_one_loop_take_turns() -> None:
    streams = [full_stream(), full_stream()]
    behind: list[int] = []

    async def exhaust(stream: BatchStream[Any]) -> None:
        async for _ in stream:
            one, other = (each.statistics().batches for each in streams)
            behind.append(abs(one - other))

    await asyncio.gather(*map(exhaust, streams))
    assert len(behind) == 2 * BATCHES
    assert max(behind) <= 2 * PER_TURN


@pytest.mark.asyncio
async def test_who_is_woken_by_a_timer_runs_within_one_turn() -> None:
    """It makes a future ready, and that wakes the task: two rounds of the event loop."""
    stream = full_stream()
    loop = asyncio.get_running_loop()
    waits: list[int] = []

    async def tick() -> None:
        while True:
            before = stream.statistics().batches
            ready = loop.create_future()
            loop.call_soon(ready.set_result, None)
            await ready
            waits.append(stream.statistics().batches - before)

    ticker = asyncio.create_task(tick())
    async for _ in stream:
        pass
    ticker.cancel()
    assert len(waits) >= BATCHES / PER_TURN - 1
    assert max(waits) <= PER_TURN + 1
