"""A coordinator that dies, and runs that resume where an earlier one was."""

import asyncio
import functools
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.data import Dataset
from ray.exceptions import RayActorError

import asyncsplit
from asyncsplit import (
    AsyncDataIterator,
    CoordinatorLostError,
    SplitOptions,
    StateMismatchError,
)
from tests.integration.consume import eventually, read, read_epoch

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


def dataset(rows: int = 1000, *, blocks: int = 10, preserve_order: bool = True) -> Dataset:
    ds = ray.data.range(rows, override_num_blocks=blocks).map_batches(lambda batch: batch)
    ds.context.execution_options.preserve_order = preserve_order
    return ds


async def kill_coordinator(it: AsyncDataIterator) -> None:
    os.kill((await it.status()).pid, signal.SIGKILL)


async def read_with_deaths(it: AsyncDataIterator, at: list[int], **kwargs: Any) -> list[int]:
    """Return one epoch's ids, killing the coordinator when so many rows have been read."""
    ids: list[int] = []
    async for batch in it.iter_batches(batch_size=10, **kwargs):
        ids += batch["id"].tolist()
        if at and len(ids) >= at[0]:
            at.pop(0)
            await kill_coordinator(it)
    return ids


@pytest.mark.parametrize(
    ("equal", "prefetch_bytes", "at"), [(True, 1, [120, 330]), (False, 2**20, [120])]
)
async def test_an_epoch_goes_on_when_the_coordinator_is_restarted(
    equal: bool, prefetch_bytes: int, at: list[int]
) -> None:
    options = SplitOptions(prefetch_bytes=prefetch_bytes)
    its = asyncsplit.streaming_split(dataset(), 2, equal=equal, options=options)
    first, second = await asyncio.gather(read_with_deaths(its[0], [*at]), read(its[1]))
    assert sorted(first + second) == list(range(1000))
    assert first == sorted(first)
    epoch = await read_epoch(its)
    assert sorted(epoch[0] + epoch[1]) == list(range(1000)), "and the next epoch is whole"


async def test_a_shuffled_epoch_goes_on_when_the_coordinator_is_restarted() -> None:
    shuffle: dict[str, Any] = {"local_shuffle_buffer_size": 50, "local_shuffle_seed": 3}
    (it,) = asyncsplit.streaming_split(dataset(), 1, options=SplitOptions(prefetch_bytes=1))
    whole = await read(it, batch_size=10, **shuffle)
    assert await read_with_deaths(it, [120], **shuffle) == whole, "each epoch is drawn alike"


@pytest.mark.parametrize("large", [True, False])
async def test_a_restarted_coordinator_has_the_datasets_own_blocks(
    large: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody holds the dataset any more but the iterator; Ray sees no reason to complain."""

    rows = 20_000 if large else 100

    def split() -> AsyncDataIterator:
        source = ray.data.from_numpy([np.arange(rows) + i * rows for i in range(8)])
        zeros = np.zeros(20_000, np.int64)  # which is pickled with the dataset
        ds = source.map_batches(lambda batch: {"id": batch["data"] + zeros[: len(batch["data"])]})
        ds.context.execution_options.preserve_order = True
        (it,) = asyncsplit.streaming_split(ds, 1, options=SplitOptions(prefetch_bytes=1))
        return it

    it = split()
    gc.collect()
    ids: list[int] = []
    async for batch in it.iter_batches(batch_size=rows // 2):
        if not ids:
            await kill_coordinator(it)
        ids += batch["id"].tolist()
    assert ids == list(range(8 * rows))
    assert "constructor arguments" not in capfd.readouterr().err


async def test_the_datasets_own_blocks_die_with_the_coordinator_if_nobody_else_has_them() -> None:
    source = ray.data.from_numpy([np.arange(20_000)] * 8)
    ds = source.map_batches(lambda batch: {"id": batch["data"]})
    ds.context.execution_options.preserve_order = True
    (it,) = asyncsplit.streaming_split(ds, 1, options=SplitOptions(prefetch_bytes=1))
    it = ray.get(ray.put(it))
    del source, ds
    gc.collect()
    with pytest.raises(CoordinatorLostError, match="keep one there"):
        await read_with_deaths(it, [10])


class Gate:
    """Shut, it stops `gated` datasets in the middle."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.open()

    def open(self) -> None:
        self._path.touch()

    def shut(self) -> None:
        self._path.unlink()

    def wait(self) -> None:
        while not self._path.exists():
            time.sleep(0.01)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "open")
    yield gate
    gate.open()


def gated(gate: Gate) -> Dataset:
    def wait(batch: Any) -> Any:
        if batch["id"][0] >= 500:
            gate.wait()
        return batch

    ds = ray.data.range(1000, override_num_blocks=10).map_batches(wait)
    ds.context.execution_options.preserve_order = True
    return ds


async def catching_up(it: AsyncDataIterator) -> None:
    """Return when a coordinator has produced some of what had been read, not all."""

    async def is_catching_up() -> bool:
        status = await it.status()
        return status.phase == "running" and 0 < status.committed_rows[0] <= 500

    await eventually(is_catching_up)


async def test_a_coordinator_may_die_while_a_resumed_run_catches_up(gate: Gate) -> None:
    (it,) = asyncsplit.streaming_split(gated(gate), 1)
    ids, state = await stop_at(it, 700)
    gate.shut()
    (again,) = asyncsplit.streaming_split(gated(gate), 1)
    again.load_state_dict(state)
    rest = asyncio.create_task(read(again))
    await catching_up(again)
    assert again.state_dict() == state
    await kill_coordinator(again)
    gate.open()
    assert ids + await rest == list(range(1000))


async def test_a_replacement_may_come_while_a_restarted_coordinator_catches_up(
    gate: Gate, start: Any
) -> None:
    # With little ahead, the consumer has to ask the new coordinator for more.
    options = SplitOptions(prefetch_bytes=1)
    (it,) = asyncsplit.streaming_split(gated(gate), 1, options=options)
    first = start(it, batch_size=100)
    ids = [i for _ in range(8) for i in await first.next.remote()]
    gate.shut()
    await kill_coordinator(it)
    waiting = first.next.remote()
    await catching_up(it)
    ray.kill(first)
    second = start(it, batch_size=100)
    going_on = second.next.remote()

    async def taken_over() -> bool:
        return await second.epoch.remote() is not None

    await eventually(taken_over)
    gate.open()
    more = await going_on
    begin = more[0]
    assert 700 <= begin <= 800, "what was finished does not come again"
    more += await second.next.remote()
    assert (await second.state.remote())["rows"] == begin + 100
    await kill_coordinator(it)
    assert ids[:begin] + more + await second.rest.remote() == list(range(1000))
    with pytest.raises(RayActorError):
        await waiting


async def test_with_the_coordinator_a_worker_dies_and_its_share_goes_on(start: Any) -> None:
    """Though all others are through with the epoch, and wait for the next one."""
    options = SplitOptions(prefetch_bytes=1)
    first, second = asyncsplit.streaming_split(dataset(), 2, equal=True, options=options)
    victim = start(first, batch_size=10)
    async with second.iter_batches(batch_size=10) as stream:
        seen, _ = await asyncio.gather(victim.next.remote(), anext(stream))
    for _ in range(11):
        seen += await victim.next.remote()
    committed = (await second.status()).committed_rows[0]
    assert committed
    ray.kill(victim)
    await kill_coordinator(second)
    replacement = start(first)
    next_epoch = asyncio.create_task(read(second))
    rest = await replacement.rest.remote()
    begin = 500 - len(rest)
    assert committed <= begin <= 120, "what is committed does not come again"
    share = seen[:begin] + rest
    assert share[: len(seen)] == seen
    assert share == sorted(set(share))
    whole = await replacement.rest.remote() + await next_epoch
    assert sorted(whole) == list(range(1000)), "and the next epoch is whole"


async def test_an_epoch_goes_on_without_a_worker_that_had_ended_for_good() -> None:
    options = SplitOptions(prefetch_bytes=1)
    first, second = asyncsplit.streaming_split(dataset(), 2, equal=True, options=options)
    async with second.iter_batches(batch_size=10) as stream:
        async with first.iter_batches(batch_size=10) as left:
            held, _ = await asyncio.gather(anext(stream), anext(left))
        await kill_coordinator(second)
        ids = held["id"].tolist() + [i async for batch in stream for i in batch["id"].tolist()]
    assert len(ids) == 500
    assert ids == sorted(set(ids))


@pytest.mark.parametrize(("preserve_order", "routing"), [(False, "rows"), (True, "demand")])
async def test_without_order_or_on_demand_a_restart_is_an_error_that_says_so(
    preserve_order: bool, routing: Any
) -> None:
    options = SplitOptions(prefetch_bytes=1, routing=routing)
    ds = dataset(preserve_order=preserve_order)
    (it,) = asyncsplit.streaming_split(ds, 1, options=options)
    with pytest.raises(CoordinatorLostError, match="preserve_order = True"):
        await read_with_deaths(it, [300])
    assert sorted(await read(it)) == list(range(1000)), "and the next epoch is whole"


async def test_without_restarts_a_dead_coordinator_is_an_error() -> None:
    options = SplitOptions(coordinator_max_restarts=0, prefetch_bytes=1)
    (it,) = asyncsplit.streaming_split(dataset(), 1, options=options)
    with pytest.raises(CoordinatorLostError, match="Create a new split"):
        await read_with_deaths(it, [300])


Stopped = tuple[list[int], dict[str, Any]]


async def stop_at(it: AsyncDataIterator, rows: int, **kwargs: Any) -> Stopped:
    """Read until at least so many rows are finished; return their ids and the state."""
    ids: list[int] = []
    async with it.iter_batches(batch_size=30, **kwargs) as stream:
        async for batch in stream:
            if len(ids) >= rows:
                return ids, it.state_dict()
            ids += batch["id"].tolist()
    return ids, it.state_dict()


Former = Callable[..., list[AsyncDataIterator]]


@pytest.fixture(scope="module")
def former(ray_cluster: None) -> Former:
    """Return a function that returns so many splits: the same for all tests, between two epochs."""

    @functools.cache
    def former(n: int, *, equal: bool = False) -> list[AsyncDataIterator]:
        return asyncsplit.streaming_split(dataset(), n, equal=equal)

    return former


@pytest.fixture(scope="module")
def stopped(ray_cluster: None) -> dict[int, list[Stopped]]:
    """Return what one, two and three splits had read of a first epoch, and their states."""

    async def stop(n: int) -> list[Stopped]:
        its = asyncsplit.streaming_split(dataset(), n)
        return await asyncio.gather(*(stop_at(it, 90) for it in its))

    return {n: asyncio.run(stop(n)) for n in (1, 2, 3)}


@pytest.mark.parametrize(("equal", "whole_list"), [(True, False), (False, True)])
async def test_a_new_run_delivers_the_rest_of_the_epoch(
    equal: bool, whole_list: bool, former: Former
) -> None:
    its = former(2, equal=equal)
    await read_epoch(its)
    current = its[0].state_dict()["epoch"]
    assert current > 0
    stopped = await asyncio.gather(stop_at(its[0], 90 * equal), stop_at(its[1], 400))
    states = json.loads(json.dumps([state for _, state in stopped]))
    assert [state["epoch"] for state in states] == [current, current]
    again = asyncsplit.streaming_split(dataset(), 2, equal=equal)
    for it, state in zip(again, states, strict=True):
        it.load_state_dict(states if whole_list else state)
    rest = await read_epoch(again)
    for (ids, _), others in zip(stopped, rest, strict=True):
        assert ids + others == sorted(ids + others)
    assert sorted([*stopped[0][0], *stopped[1][0], *rest[0], *rest[1]]) == list(range(1000))
    epoch = await read_epoch(again)
    assert sorted(epoch[0] + epoch[1]) == list(range(1000)), "and then full epochs"
    assert again[0].state_dict()["epoch"] == current + 2


SHUFFLE: dict[str, Any] = {"local_shuffle_buffer_size": 60, "batch_size": 30}


async def test_a_shuffled_run_goes_on_in_the_order_it_had(former: Former) -> None:
    its = former(2, equal=True)
    for seed in (7, None):
        stopped = await asyncio.gather(
            *(
                stop_at(it, rows, local_shuffle_buffer_size=60, local_shuffle_seed=seed)
                for it, rows in zip(its, (90, 400), strict=True)
            )
        )
        again = asyncsplit.streaming_split(dataset(), 2, equal=True)
        for it, (_, state) in zip(again, stopped, strict=True):
            it.load_state_dict(json.loads(json.dumps(state)))
        rest = await read_epoch(again, **SHUFFLE)
        epoch = [[*ids, *others] for (ids, _), others in zip(stopped, rest, strict=True)]
        assert sorted(epoch[0] + epoch[1]) == list(range(1000))
        if seed is not None:
            assert epoch == await read_epoch(its, local_shuffle_seed=seed, **SHUFFLE), "drawn alike"
        after = await read_epoch(again, **SHUFFLE)
        assert sorted(after[0] + after[1]) == list(range(1000)), "and then full epochs"


async def test_a_shuffled_state_needs_the_same_shuffle(former: Former) -> None:
    (it,) = former(1)
    _, state = await stop_at(it, 300, local_shuffle_buffer_size=60)
    others: list[dict[str, Any]] = [
        {},
        {**SHUFFLE, "batch_size": 10},
        {**SHUFFLE, "local_shuffle_buffer_size": 9},
    ]
    (again,) = asyncsplit.streaming_split(dataset(), 1)
    again.load_state_dict(state)
    for arguments in others:
        says = "local_shuffle_buffer_size=60 and batch_size=30"
        with pytest.raises(StateMismatchError, match=says):
            await read(again, **arguments)


@pytest.mark.parametrize("equal", [True, False])
async def test_another_number_of_splits_shares_what_is_left(equal: bool, former: Former) -> None:
    """Of an epoch begun by two, continued by three, and ended by one."""
    read_before: list[int] = []
    states: list[dict[str, Any]] = []
    for rows in ((90, 400), (60, 0, 30)):
        if states:
            its = asyncsplit.streaming_split(dataset(), len(rows), equal=equal)
            for it in its:
                it.load_state_dict(states)
        else:
            its = former(len(rows), equal=equal)
        stopped = await asyncio.gather(*map(stop_at, its, rows))
        read_before += [i for ids, _ in stopped for i in ids]
        states = json.loads(json.dumps([saved for _, saved in stopped]))
    (last,) = asyncsplit.streaming_split(dataset(), 1, equal=equal)
    last.load_state_dict(states)
    rest = await read(last)
    # Three equal splits drop up to two rows.
    assert len(read_before + rest) == len({*read_before, *rest}) >= 1000 - 2 * equal
    assert len(await read(last)) == 1000, "and then full epochs"


async def test_padded_shares_outlive_the_coordinator_and_the_run() -> None:
    its = asyncsplit.streaming_split(dataset(), 3, equal="pad")
    epoch = await asyncio.gather(read_with_deaths(its[0], [120]), read(its[1]), read(its[2]))
    assert [len(ids) for ids in epoch] == [334] * 3
    assert set(chain(*epoch)) == set(range(1000))
    stopped = await asyncio.gather(*map(stop_at, its, (90, 330, 200)))
    states = json.loads(json.dumps([state for _, state in stopped]))
    read_before = [i for ids, _ in stopped for i in ids]
    for n in (3, 2):
        again = asyncsplit.streaming_split(dataset(), n, equal="pad")
        for it in again:
            it.load_state_dict(states)
        rest = await read_epoch(again)
        assert {*read_before, *chain(*rest)} == set(range(1000))
        if n == 3:
            assert [len(a) + len(b) for (a, _), b in zip(stopped, rest, strict=True)] == [334] * 3
        else:
            assert len(rest[0]) == len(rest[1])
            # Two were repeated at most by those who read before, and one more now.
            assert len(read_before) + len(rest[0]) * 2 <= 1000 + 3


async def test_a_split_that_had_finished_has_nothing_left_for_others(former: Former) -> None:
    its = former(2)
    first, (ids, state) = await asyncio.gather(read(its[0]), stop_at(its[1], 90))
    (again,) = asyncsplit.streaming_split(dataset(), 1)
    again.load_state_dict([its[0].state_dict(), state])
    assert sorted(first + ids + await read(again)) == list(range(1000))


@pytest.mark.parametrize("epochs_later", [0, 1])
async def test_states_of_two_runs_are_refused(
    epochs_later: int, stopped: dict[int, list[Stopped]]
) -> None:
    runs = [[state for _, state in stopped[n]] for n in (2, 3)]
    epoch = runs[0][0]["epoch"] + epochs_later
    runs[1] = [{**state, "epoch": epoch} for state in runs[1]]
    again = asyncsplit.streaming_split(dataset(), 4)
    for it, states in zip(again, runs * 2, strict=True):
        it.load_state_dict(states)
    outcomes = await asyncio.gather(*map(read, again), return_exceptions=True)
    assert all(isinstance(outcome, StateMismatchError) for outcome in outcomes)


async def test_states_between_epochs(former: Former) -> None:
    (it,) = former(1)
    epoch = it.state_dict()["epoch"]
    await read(it)
    state = it.state_dict()
    assert (state["epoch"], state["rows"]) == (epoch + 1, 0)
    (again,) = asyncsplit.streaming_split(dataset(preserve_order=False), 1)
    assert again.state_dict()["epoch"] == 0
    again.load_state_dict(state)
    assert len(await read(again)) == 1000
    assert again.state_dict()["epoch"] == epoch + 2


@pytest.mark.parametrize(
    ("preserve_order", "options"),
    [(False, SplitOptions()), (True, SplitOptions(routing="demand"))],
    ids=["not in order", "on demand"],
)
async def test_a_state_that_cannot_be_loaded_warns_when_it_is_taken(
    preserve_order: bool, options: SplitOptions
) -> None:
    ds = dataset(preserve_order=preserve_order)
    (it,) = asyncsplit.streaming_split(ds, 1, options=options)
    with pytest.warns(RuntimeWarning, match=r"cannot be loaded: epoch 0 .*preserve_order = True"):
        _, state = await stop_at(it, 90)
    (again,) = asyncsplit.streaming_split(ds, 1, options=options)
    again.load_state_dict(state)
    with pytest.raises(StateMismatchError, match="cannot be resumed in the middle"):
        await read(again)
    assert len(await read(again)) == 1000, "whoever iterates again begins with the next epoch"
    assert again.state_dict()["epoch"] == 2
    await read(it)
    assert it.state_dict()["rows"] == 0, "between two epochs it does not warn"


async def test_a_dataset_that_holds_its_blocks_is_resumed() -> None:
    ds = dataset().materialize()
    (it,) = asyncsplit.streaming_split(ds, 1)
    ids, state = await stop_at(it, 90)
    (again,) = asyncsplit.streaming_split(ds, 1)
    again.load_state_dict(state)
    assert ids + await read(again) == list(range(1000))


async def test_another_dataset_is_refused(stopped: dict[int, list[Stopped]]) -> None:
    """And so is one whose blocks do not go to the same splits again."""
    ((ids, state),) = stopped[1]
    others = [
        (dataset(2000), SplitOptions()),
        (dataset(blocks=5), SplitOptions()),
        (dataset(len(ids) // 2, blocks=2), SplitOptions()),
        (dataset(preserve_order=False), SplitOptions()),
        (dataset(), SplitOptions(routing="demand")),
    ]
    for ds, options in others:
        (again,) = asyncsplit.streaming_split(ds, 1, options=options)
        again.load_state_dict(state)
        with pytest.raises(StateMismatchError):
            await read(again)


async def test_a_state_goes_along_to_where_the_split_is_read(
    start: Any, stopped: dict[int, list[Stopped]]
) -> None:
    """Also again, when whoever reads it is restarted with what it was given."""
    ((begin, state),) = stopped[1]
    (again,) = asyncsplit.streaming_split(dataset(), 1)
    again.load_state_dict(state)
    first = start(again, prefetch_batches=0)
    ids = [*await first.next.remote(), *await first.next.remote()]
    with pytest.warns(RuntimeWarning, match="says nothing of what the copies read"):
        assert again.state_dict() == state
    with pytest.warns(RuntimeWarning, match="the copies do not have it"):
        again.load_state_dict(state)
    os.kill(await first.pid.remote(), signal.SIGKILL)
    rest = await start(again).rest.remote()
    assert begin + ids[: rest[0] - len(begin)] + rest == list(range(1000))
    assert rest[0] <= len(begin) + 10, "its second batch was not committed"


async def test_states_of_some_splits_only_are_refused(stopped: dict[int, list[Stopped]]) -> None:
    again = asyncsplit.streaming_split(dataset(), 2)
    again[0].load_state_dict(stopped[2][0][1])
    outcomes = await asyncio.gather(*(read(it) for it in again), return_exceptions=True)
    assert all(isinstance(outcome, StateMismatchError) for outcome in outcomes)


async def test_a_state_that_comes_too_late_is_refused(former: Former) -> None:
    (it,) = former(1)
    state = it.state_dict()
    await read(it)
    with pytest.raises(StateMismatchError, match="has been iterated already"):
        it.load_state_dict(state)
