"""`as_data_iterator`: a split as a `ray.data.DataIterator`."""

import asyncio
import threading
from typing import Any, cast

import numpy as np
import pytest
import ray
import torch
from ray.data import DataIterator, Dataset
from ray.data.collate_fn import NumpyBatchCollateFn

import asyncsplit
from asyncsplit import ConsumerConflictError, stream
from asyncsplit.sync import SyncDataIterator

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Doubled(NumpyBatchCollateFn):
    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        assert threading.current_thread() is not threading.main_thread(), "beside the loop"
        return torch.as_tensor(batch["id"] * 2)


class Negative(NumpyBatchCollateFn):
    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        return {"id": -batch["id"]}


@pytest.fixture(scope="module")
def dataset(ray_cluster: None) -> Dataset:
    ds = ray.data.range(100, override_num_blocks=4)
    ds.context.execution_options.preserve_order = True
    return ds


@pytest.fixture(scope="module")
def it(ray_cluster: None, dataset: Dataset) -> SyncDataIterator:
    (split,) = asyncsplit.streaming_split(dataset, 1)
    return split.as_data_iterator()


def ids(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch["id"]]


def test_it_is_a_data_iterator_with_all_that_one_has(it: SyncDataIterator) -> None:
    assert isinstance(it, DataIterator)
    assert repr(it) == "<SyncDataIterator split=0 of 1>"
    assert (it.split_index, it.world_size()) == (0, 1)
    schema = it.schema()
    assert schema is not None
    assert schema.names == ["id"]
    assert it.get_context().execution_options.preserve_order
    everything = list(range(100))
    batches = it.iter_batches(batch_size=30)
    assert ids(batches) == everything
    assert ids(batches) == everything, "each iteration is an epoch"
    assert [row["id"] for row in it.iter_rows()] == everything
    torch_batches = it.iter_torch_batches(batch_size=30, dtypes=torch.float32)
    assert [int(value) for batch in torch_batches for value in batch["id"]] == everything
    collated = it.iter_torch_batches(batch_size=50, collate_fn=Doubled())
    assert torch.equal(torch.cat([*cast("Any", collated)]), torch.arange(0, 200, 2))
    arrays = it.iter_jax_batches(batch_size=50, collate_fn=Negative(), drop_last=True)
    assert [-int(value) for batch in arrays for value in cast("Any", batch)["id"]] == everything
    materialized = it.materialize()
    assert [row["id"] for row in materialized.take_all()] == everything
    assert "ReadRange" in it.stats()


def test_in_workers_it_has_the_splits_rows(dataset: Dataset) -> None:
    # Not at the top of the module, which a worker would import to find it, and PyTorch with it.
    @ray.remote(num_cpus=0)
    def read_there(it: DataIterator) -> list[int]:
        return [int(i) for batch in it.iter_batches(batch_size=7) for i in batch["id"]]

    splits = asyncsplit.streaming_split(dataset, 2, equal=True)
    parts = ray.get([read_there.remote(split.as_data_iterator()) for split in splits])
    assert sorted(parts[0] + parts[1]) == list(range(100))
    assert len(parts[0]) == len(parts[1]) == 50


def test_a_split_is_read_once_at_a_time_and_released_by_break(it: SyncDataIterator) -> None:
    batches = it.iter_batches(batch_size=10)
    for _ in batches:
        with pytest.raises(ConsumerConflictError):
            next(iter(batches))
        break
    assert ids(batches) == list(range(100))
    with pytest.raises(ValueError, match="batch_size=0"):
        it.iter_batches(batch_size=0)


def test_a_state_counts_the_batch_in_hand_if_told_that_it_is_finished(
    dataset: Dataset, it: SyncDataIterator
) -> None:
    batches = iter(it.iter_batches(batch_size=10))
    seen = ids([next(batches), next(batches)])
    assert it.state_dict()["rows"] == 10
    state = it.state_dict(batch_finished=True)
    assert state["rows"] == 20
    rest = ids(batches)
    assert seen + rest == list(range(100)), "saving disturbs nothing"
    (other,) = asyncsplit.streaming_split(dataset, 1)
    resumed = other.as_data_iterator()
    resumed.load_state_dict(state)
    assert ids(resumed.iter_batches()) == rest


def test_in_an_event_loop_it_blocks_and_warns(
    it: SyncDataIterator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_warned", False)

    async def main() -> list[int]:
        return ids(it.iter_batches())

    with pytest.warns(RuntimeWarning, match="async for"):
        assert asyncio.run(main()) == list(range(100))
