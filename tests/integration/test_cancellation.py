"""A cancelled wait loses nothing, wherever it was cancelled."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Coroutine
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import pytest
import ray
import uvloop
from ray.data import Dataset

import asyncsplit
from asyncsplit import BatchStream
from tests.integration.consume import read

pytestmark = pytest.mark.usefixtures("ray_cluster")


def slow_dataset(gate: Path) -> Dataset:
    """Return a dataset whose second half comes only once the gate is open."""

    def wait(batch: Any) -> Any:
        import time

        while batch["id"].min() >= 50 and not gate.exists():
            time.sleep(0.005)
        return batch

    ds = ray.data.range(100, override_num_blocks=10).map_batches(wait)
    ds.context.execution_options.preserve_order = True
    return ds


class Interrupted:
    """Drive a coroutine as a task would, and cancel it at its ``at``-th suspension."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, Any]], at: int) -> None:
        self._coroutine = make()
        self._at = at
        self.cancelled = False

    def __await__(self) -> Any:
        for suspension in count():
            try:
                waited_for = self._coroutine.send(None)
            except StopIteration as done:
                return done.value
            if suspension == self._at:
                self.cancelled = True
                if waited_for is not None:
                    waited_for._asyncio_future_blocking = False
                    waited_for.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    self._coroutine.throw(asyncio.CancelledError())
                return None
            yield waited_for


async def read_with_cancellations(stream: BatchStream[Any]) -> tuple[list[int], int]:
    """Read a stream, cancelling each wait at every suspension point in turn."""
    ids: list[int] = []
    cancellations = 0
    while True:
        for at in count():
            attempt = Interrupted(stream.__anext__, at)
            try:
                batch = await attempt
            except StopAsyncIteration:
                return ids, cancellations
            if not attempt.cancelled:
                ids += batch["id"].tolist()
                break
            cancellations += 1
            if at > 3:  # each suspension point has been hit: let the block come
                batch = await stream.__anext__()
                ids += batch["id"].tolist()
                break


@pytest.mark.asyncio
@pytest.mark.parametrize("batch_size", [7, None])
async def test_cancelling_at_every_suspension_point(tmp_path: Path, batch_size: int | None) -> None:
    (tmp_path / "gate").touch()
    (it,) = asyncsplit.streaming_split(slow_dataset(tmp_path / "gate"), 1)
    for _ in range(2):
        async with it.iter_batches(batch_size=batch_size) as stream:
            ids, cancellations = await read_with_cancellations(stream)
        assert ids == list(range(100))
        assert cancellations > 5


async def time_out_and_carry_on(gate: Path) -> list[int]:
    (it,) = asyncsplit.streaming_split(slow_dataset(gate), 1)
    ids: list[int] = []
    timeouts = 0
    async with it.iter_batches(batch_size=10) as stream:
        while True:
            try:
                async with asyncio.timeout(0.2):
                    batch = await anext(stream)
            except TimeoutError:
                timeouts += 1
                if timeouts == 3:
                    await asyncio.to_thread(gate.touch)
                continue
            except StopAsyncIteration:
                break
            ids += batch["id"].tolist()
    assert timeouts >= 3
    return ids


@pytest.mark.asyncio
async def test_a_timeout_around_a_slow_batch_and_carrying_on(tmp_path: Path) -> None:
    assert await time_out_and_carry_on(tmp_path / "gate") == list(range(100))


def test_on_uvloop(tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(time_out_and_carry_on(tmp_path / "gate")) == list(range(100))


def test_with_asyncios_debug_mode(tmp_path: Path) -> None:
    with asyncio.Runner(debug=True) as runner:
        assert runner.run(time_out_and_carry_on(tmp_path / "gate")) == list(range(100))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_with_eager_tasks(tmp_path: Path) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        return await asyncio.create_task(time_out_and_carry_on(tmp_path / "gate"))

    assert asyncio.run(main()) == list(range(100))


def test_from_anyio(tmp_path: Path) -> None:
    async def main() -> list[int]:
        (tmp_path / "gate").touch()
        its = asyncsplit.streaming_split(slow_dataset(tmp_path / "gate"), 2)
        ids: list[int] = []

        async def consume(i: int) -> None:
            ids.extend(await read(its[i]))

        with anyio.move_on_after(0.01):
            await consume(0)
        ids.clear()
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(consume, 0)
                group.start_soon(consume, 1)
        return sorted(ids)

    assert anyio.run(main) == list(range(100))


def test_nothing_is_left_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        its = asyncsplit.streaming_split(ray.data.range(100, override_num_blocks=4), 2)
        readers = [asyncio.create_task(read(it)) for it in its]
        await asyncio.wait(readers, timeout=0.05)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        async for _ in asyncsplit.iter_batches(ray.data.range(100)):
            break

    threads = set(threading.enumerate())
    asyncio.run(main(), debug=True)
    assert set(threading.enumerate()) <= threads
    printed = capfd.readouterr().err
    assert "never retrieved" not in printed
    assert "was destroyed" not in printed


def test_a_plain_loop_inside_a_running_loop_warns_that_it_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asyncsplit.stream._warned", False)

    async def main() -> int:
        rows = 0
        (it,) = asyncsplit.streaming_split(ray.data.range(10), 1)
        for _ in range(2):
            for batch in it.iter_batches():
                rows += len(batch["id"])
        return rows

    with pytest.warns(RuntimeWarning, match="use `async for`") as warned:
        assert asyncio.run(main()) == 20
    assert len(warned) == 1
