"""A consumer dies, is replaced, comes back, or keeps the others waiting."""

import asyncio
import os
import signal
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.data import Dataset

import asyncsplit
from asyncsplit import (
    AsyncDataIterator,
    ConsumerConflictError,
    ConsumerLostError,
    SplitOptions,
)
from tests.integration.consume import eventually, read, read_epoch

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


def thousand(blocks: int = 10, *, preserve_order: bool = True) -> Dataset:
    ds = ray.data.range(1000, override_num_blocks=blocks)
    ds.context.execution_options.preserve_order = preserve_order
    return ds


@pytest.fixture(scope="module")
def splits(ray_cluster: None) -> list[AsyncDataIterator]:
    """Return two splits for tests that leave them between two epochs."""
    return asyncsplit.streaming_split(thousand(), 2)


async def committed(it: AsyncDataIterator, split: int) -> int:
    return (await it.status()).committed_rows[split]


@pytest.mark.parametrize(
    ("death", "equal", "routing"),
    [("SIGKILL", True, "rows"), ("ray.kill", False, "rows"), ("SIGKILL", False, "demand")],
)
async def test_a_replacement_goes_on_from_the_first_uncommitted_row(
    death: str, equal: bool, routing: Any, start: Any
) -> None:
    options = SplitOptions(routing=routing)
    # Order plays no part: what comes again is remembered, not produced again.
    ds = thousand(20, preserve_order=equal)
    first, second = asyncsplit.streaming_split(ds, 2, equal=equal, options=options)
    victim = start(first)
    async with second.iter_batches(batch_size=10) as stream:
        # It reads on only when the victim is dead: else it could get all there is, on demand.
        seen, held = await asyncio.gather(victim.next.remote(), anext(stream))
        others = held["id"].tolist()
        for _ in range(11):
            seen += await victim.next.remote()
        rows = await committed(second, 0)
        if death == "SIGKILL":
            os.kill(await victim.pid.remote(), signal.SIGKILL)
        else:
            ray.kill(victim)
        rest = await start(first).rest.remote()
        others += [i async for batch in stream for i in batch["id"].tolist()]
    again = seen[seen.index(rest[0]) :] if rest[0] in seen else []
    assert rest[: len(again)] == again, "what was not committed comes again, in order"
    assert len(seen) - len(again) >= rows > 0, "what was committed does not come again"
    assert sorted(seen + rest[len(again) :] + others) == list(range(1000))


async def test_a_replacement_goes_on_in_the_shuffled_order(start: Any) -> None:
    """Which the one before has drawn without being given a seed."""
    first, second = asyncsplit.streaming_split(thousand(20), 2, equal=True)
    others = asyncio.create_task(read(second))
    victim = start(first, local_shuffle_buffer_size=100)
    seen = [i for _ in range(20) for i in await victim.next.remote()]
    rows = await committed(second, 0)
    ray.kill(victim)
    rest = await start(first, local_shuffle_buffer_size=100).rest.remote()
    before, again = seen[: 500 - len(rest)], seen[500 - len(rest) :]
    assert len(before) >= rows > 0, "what was committed does not come again"
    assert rest[: len(again)] == again, "and what was not comes again in the same order"
    assert sorted(before + rest + await others) == list(range(1000))


async def test_a_replacement_that_shuffles_otherwise_gets_some_rows_again(start: Any) -> None:
    (it,) = asyncsplit.streaming_split(thousand(), 1)
    victim = start(it, local_shuffle_buffer_size=100)
    seen = [i for _ in range(20) for i in await victim.next.remote()]
    ray.kill(victim)
    rest = await start(it, local_shuffle_buffer_size=200).rest.remote()
    assert len(rest) == len(set(rest))
    assert {*seen, *rest} == set(range(1000))
    assert {*seen} & {*rest}


class Pair:
    """Reads two splits in one process."""

    def __init__(self, its: Sequence[AsyncDataIterator]) -> None:
        self._its = list(its)

    async def begin(self) -> list[int]:
        """Return the ids of both splits' first batches."""
        self._streams = [it.iter_batches(batch_size=10) for it in self._its]
        batches = await asyncio.gather(*map(anext, self._streams))
        return [int(i) for batch in batches for i in batch["id"]]

    async def drop(self) -> None:
        """Let go of one; return when the coordinator has had all that this process said of it."""
        await self._streams.pop().aclose()
        self._its.pop()
        for it in self._its:
            await it.status()


def parked(coordinator: Any) -> int:
    """Count a coordinator's lifelines."""
    return len(coordinator._runner.lifelines._parked)


def deaths(coordinator: Any) -> int:
    """Count the consumers that a coordinator has seen die."""
    return int(coordinator._state.deaths)


async def test_consumers_of_one_process_share_a_lifeline_and_die_together(
    splits: list[AsyncDataIterator],
) -> None:
    coordinator: Any = splits[0].coordinator
    others, before = [await coordinator.__ray_call__.remote(count) for count in (parked, deaths)]
    pair: Any = ray.remote(num_cpus=0)(Pair).remote(splits)
    await pair.begin.remote()
    assert await coordinator.__ray_call__.remote(parked) == others + 1
    ray.kill(pair)

    async def buried() -> bool:
        return bool(await coordinator.__ray_call__.remote(deaths) == before + 2)

    await eventually(buried)
    ids = await asyncio.gather(*map(read, splits))
    assert sorted(chain(*ids)) == list(range(1000)), "nothing was committed"


async def test_a_lifeline_ends_with_the_last_consumer_of_its_process(
    splits: list[AsyncDataIterator],
) -> None:
    coordinator: Any = splits[0].coordinator
    others = await coordinator.__ray_call__.remote(parked)
    pair: Any = ray.remote(num_cpus=0)(Pair).remote(splits)
    assert len(await pair.begin.remote()) == 20
    await pair.drop.remote()
    assert await coordinator.__ray_call__.remote(parked) == others + 1, "the other one still reads"
    await pair.drop.remote()

    async def released() -> bool:
        return bool(await coordinator.__ray_call__.remote(parked) == others)

    await eventually(released)


async def test_others_go_on_while_a_consumer_is_dead(start: Any) -> None:
    first, second = asyncsplit.streaming_split(thousand(), 2, equal=True)
    victim, other = start(first), asyncio.create_task(read(second))
    await victim.next.remote()
    ray.kill(victim)
    assert len(await other) == 500
    assert len(await start(first).rest.remote()) == 500


async def test_a_consumer_that_died_at_the_barrier_is_missing_again(
    start: Any, splits: list[AsyncDataIterator]
) -> None:
    first, second = splits
    victim = start(first)
    waiting = victim.next.remote()

    async def arrived() -> bool:
        return (await second.status()).missing == [1]

    await eventually(arrived)
    ray.kill(victim)

    async def missing() -> bool:
        return (await second.status()).missing == [0, 1]

    await eventually(missing)
    assert sorted(chain(*await read_epoch([first, second]))) == list(range(1000))
    del waiting


async def test_a_consumer_that_was_replaced_is_fenced() -> None:
    """One thought dead that comes back must not go on beside its replacement."""
    (it,) = asyncsplit.streaming_split(thousand(), 1, options=SplitOptions(prefetch_bytes=1))
    replacement = cloudpickle.loads(cloudpickle.dumps(it))
    async with it.iter_batches(batch_size=1) as old:
        await anext(old)
        await it._ask("report_death", 0, old._feed._stream)  # type: ignore[union-attr]
        ids = await read(replacement)
        with pytest.raises(ConsumerConflictError, match="was thought dead"):
            [batch async for batch in old]
    assert len(ids) >= 999


async def test_a_split_missing_at_the_barrier_ends_in_an_error_that_names_it() -> None:
    options = SplitOptions(barrier_timeout_s=2)
    its = asyncsplit.streaming_split(thousand(), 3, options=options)
    waiting = [asyncio.create_task(read(it)) for it in its[:2]]
    for task in waiting:
        with pytest.raises(
            ConsumerLostError, match=r"epoch 0 cannot go on: split 2 has not been heard of for"
        ) as raised:
            await task
        assert isinstance(raised.value, TimeoutError)
        assert "barrier_timeout_s" in str(raised.value)
    assert sorted(chain(*await read_epoch(its))) == list(range(1000)), "and then all come"


async def test_a_silent_split_others_need_ends_the_epoch_for_all() -> None:
    options = SplitOptions(barrier_timeout_s=2, prefetch_bytes=1)
    first, second = asyncsplit.streaming_split(thousand(20), 2, options=options)
    async with first.iter_batches(batch_size=1) as silent:
        _, outcome = await asyncio.gather(anext(silent), read(second), return_exceptions=True)
        assert isinstance(outcome, ConsumerLostError)
        assert "split 0 has not been heard of" in str(outcome)
        with pytest.raises(ConsumerLostError):
            [batch async for batch in silent]
    assert sorted(chain(*await read_epoch([first, second]))) == list(range(1000))


async def test_a_slow_split_that_still_reads_is_not_lost() -> None:
    options = SplitOptions(barrier_timeout_s=2)
    first, second = asyncsplit.streaming_split(thousand(), 2, options=options)
    waiting = asyncio.create_task(read_twice(first))
    ids = []
    async for batch in second.iter_batches(batch_size=50):
        ids += batch["id"].tolist()
        await asyncio.sleep(0.4)  # a training step: slow, but it comes back within the timeout
    ids += await read(second)
    assert sorted(ids + await waiting) == sorted([*range(1000), *range(1000)])


async def read_twice(it: AsyncDataIterator) -> list[int]:
    return await read(it) + await read(it)


async def test_a_dead_consumer_nobody_replaces_ends_the_wait_early(start: Any) -> None:
    options = SplitOptions(rejoin_timeout_s=1, prefetch_bytes=1)
    first, second = asyncsplit.streaming_split(thousand(20), 2, options=options)
    victim, other = start(first), asyncio.create_task(read(second))
    await victim.next.remote()
    ray.kill(victim)
    with pytest.raises(ConsumerLostError, match=r"split 0 died \d+ s ago and was not replaced"):
        await other
    assert sorted(chain(*await read_epoch([first, second]))) == list(range(1000))


async def test_an_epoch_all_of_whose_consumers_died_is_stopped(start: Any) -> None:
    options = SplitOptions(rejoin_timeout_s=1, prefetch_bytes=1)
    (it,) = asyncsplit.streaming_split(thousand(20), 1, options=options)
    victim = start(it)
    await victim.next.remote()
    ray.kill(victim)

    async def over() -> bool:
        status = await it.status()
        return status.phase == "waiting" and not status.executing and not status.held_bytes

    await eventually(over)


async def test_a_retried_task_goes_on() -> None:
    def train(it: AsyncDataIterator, marker: str) -> list[int]:
        ids: list[int] = []
        for batch in it.iter_batches(batch_size=10):
            ids += map(int, batch["id"])
            if len(ids) >= 200 and not os.path.exists(marker):
                open(marker, "w").close()
                os._exit(1)
        return ids

    (it,) = asyncsplit.streaming_split(thousand(), 1)
    marker = f"/tmp/asyncsplit-retried-{os.getpid()}"
    try:
        ids = await ray.remote(train).options(num_cpus=0, max_retries=1).remote(it, marker)
    finally:
        os.unlink(marker)
    assert ids == list(range(ids[0], 1000))
    assert ids[0] <= 200


async def test_the_no_progress_guard_leaves_a_pause_of_the_consumers_alone() -> None:
    ds = ray.data.range(1000, override_num_blocks=100).map_batches(lambda batch: batch)
    ds.context.execution_no_progress_timeout_s = 2
    ds.context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=2_000
    )
    (it,) = asyncsplit.streaming_split(ds, 1, options=SplitOptions(prefetch_bytes=1))
    async with it.iter_batches(batch_size=10) as stream:
        ids = (await anext(stream))["id"].tolist()
        await asyncio.sleep(6)  # the pause itself: a validation run
        async for batch in stream:
            ids += batch["id"].tolist()
    assert sorted(ids) == list(range(1000))
