"""A coordinator that dies, and runs that resume where an earlier one was."""

import asyncio
import gc
import json
import os
import signal
from typing import Any

import numpy as np
import pytest
import ray
from ray.data import Dataset

import asyncsplit
from asyncsplit import AsyncDataIterator, CoordinatorLostError, SplitOptions, StateMismatchError
from tests.integration.consume import read, read_epoch

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


def dataset(rows: int = 1000, *, blocks: int = 20, preserve_order: bool = True) -> Dataset:
    ds = ray.data.range(rows, override_num_blocks=blocks).map_batches(lambda batch: batch)
    ds.context.execution_options.preserve_order = preserve_order
    return ds


async def kill_coordinator(it: AsyncDataIterator) -> None:
    os.kill((await it.status()).pid, signal.SIGKILL)


async def read_with_deaths(it: AsyncDataIterator, at: list[int]) -> list[int]:
    """Return one epoch's ids, killing the coordinator when so many rows have been read."""
    ids: list[int] = []
    async for batch in it.iter_batches(batch_size=10):
        ids += batch["id"].tolist()
        if at and len(ids) >= at[0]:
            at.pop(0)
            await kill_coordinator(it)
    return ids


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("prefetch_bytes", [1, 2**20])
async def test_an_epoch_goes_on_when_the_coordinator_is_restarted(
    equal: bool, prefetch_bytes: int
) -> None:
    options = SplitOptions(prefetch_bytes=prefetch_bytes)
    its = asyncsplit.streaming_split(dataset(), 2, equal=equal, options=options)
    first, second = await asyncio.gather(read_with_deaths(its[0], [120, 330]), read(its[1]))
    assert sorted(first + second) == list(range(1000))
    assert first == sorted(first)
    epoch = await read_epoch(its)
    assert sorted(epoch[0] + epoch[1]) == list(range(1000)), "and the next epoch is whole"


@pytest.mark.parametrize("large", [True, False])
async def test_a_restarted_coordinator_has_the_datasets_own_blocks(
    large: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody holds the dataset any more but the iterator; Ray sees no reason to complain."""

    def split() -> AsyncDataIterator:
        rows = 20_000 if large else 100
        source = ray.data.from_numpy([np.arange(rows) + i * rows for i in range(8)])
        zeros = np.zeros(20_000, np.int64)  # which is pickled with the dataset
        ds = source.map_batches(lambda batch: {"id": batch["data"] + zeros[: len(batch["data"])]})
        ds.context.execution_options.preserve_order = True
        (it,) = asyncsplit.streaming_split(ds, 1, options=SplitOptions(prefetch_bytes=1))
        return it

    it = split()
    gc.collect()
    ids: list[int] = []
    async for batch in it.iter_batches(batch_size=50):
        if not ids:
            await kill_coordinator(it)
        ids += batch["id"].tolist()
    assert ids == list(range(160_000 if large else 800))
    assert "constructor arguments" not in capfd.readouterr().err


async def test_without_order_a_restart_is_an_error_that_says_so() -> None:
    options = SplitOptions(prefetch_bytes=1)
    (it,) = asyncsplit.streaming_split(dataset(preserve_order=False), 1, options=options)
    with pytest.raises(CoordinatorLostError, match="preserve_order = True"):
        await read_with_deaths(it, [300])
    assert sorted(await read(it)) == list(range(1000)), "and the next epoch is whole"


async def test_without_restarts_a_dead_coordinator_is_an_error() -> None:
    options = SplitOptions(coordinator_max_restarts=0, prefetch_bytes=1)
    (it,) = asyncsplit.streaming_split(dataset(), 1, options=options)
    with pytest.raises(CoordinatorLostError, match="Create a new split"):
        await read_with_deaths(it, [300])


async def stop_at(it: AsyncDataIterator, rows: int) -> tuple[list[int], dict[str, int]]:
    """Read until at least so many rows are finished; return their ids and the state."""
    ids: list[int] = []
    async with it.iter_batches(batch_size=30) as stream:
        async for batch in stream:
            if len(ids) >= rows:
                return ids, it.state_dict()
            ids += batch["id"].tolist()
    return ids, it.state_dict()


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("whole_list", [True, False])
async def test_a_new_run_delivers_the_rest_of_the_epoch(equal: bool, whole_list: bool) -> None:
    its = asyncsplit.streaming_split(dataset(), 2, equal=equal)
    await read_epoch(its)
    stopped = await asyncio.gather(stop_at(its[0], 90), stop_at(its[1], 400))
    states = json.loads(json.dumps([state for _, state in stopped]))
    assert [state["epoch"] for state in states] == [1, 1]
    again = asyncsplit.streaming_split(dataset(), 2, equal=equal)
    for it, state in zip(again, states, strict=True):
        it.load_state_dict(states if whole_list else state)
    rest = await read_epoch(again)
    for (ids, _), others in zip(stopped, rest, strict=True):
        assert ids + others == sorted(ids + others)
    assert sorted([*stopped[0][0], *stopped[1][0], *rest[0], *rest[1]]) == list(range(1000))
    epoch = await read_epoch(again)
    assert sorted(epoch[0] + epoch[1]) == list(range(1000)), "and then full epochs"
    assert again[0].state_dict()["epoch"] == 3


async def test_states_between_epochs() -> None:
    (it,) = asyncsplit.streaming_split(dataset(), 1)
    assert it.state_dict()["epoch"] == 0
    await read(it)
    state = it.state_dict()
    assert (state["epoch"], state["rows"]) == (1, 0)
    (again,) = asyncsplit.streaming_split(dataset(preserve_order=False), 1)
    again.load_state_dict(state)
    assert len(await read(again)) == 1000
    assert again.state_dict()["epoch"] == 2


@pytest.mark.parametrize(
    "other",
    [
        {"rows": 2000},
        {"blocks": 10},
        {"rows": 100, "blocks": 2},
        {"preserve_order": False},
    ],
)
async def test_another_dataset_is_refused(other: dict[str, Any]) -> None:
    (it,) = asyncsplit.streaming_split(dataset(), 1)
    _, state = await stop_at(it, 300)
    (again,) = asyncsplit.streaming_split(dataset(**other), 1)
    again.load_state_dict(state)
    with pytest.raises(StateMismatchError):
        await read(again)


async def test_states_of_some_splits_only_are_refused() -> None:
    its = asyncsplit.streaming_split(dataset(), 2)
    (_, state), _ = await asyncio.gather(stop_at(its[0], 90), stop_at(its[1], 90))
    again = asyncsplit.streaming_split(dataset(), 2)
    again[0].load_state_dict(state)
    outcomes = await asyncio.gather(*(read(it) for it in again), return_exceptions=True)
    assert all(isinstance(outcome, StateMismatchError) for outcome in outcomes)


async def test_a_state_that_comes_too_late_is_refused() -> None:
    (it,) = asyncsplit.streaming_split(dataset(), 1)
    state = it.state_dict()
    await read(it)
    with pytest.raises(StateMismatchError, match="has been iterated already"):
        it.load_state_dict(state)
