"""Tensors through real splits: delivery, position, errors and threads are those of any batch."""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import ray
import torch
from ray.data.collate_fn import NumpyBatchCollateFn
from torch.utils.data import DataLoader

from asyncsplit import AsyncDataIterator, streaming_split
from tests.integration.consume import eventually

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray's own constructor sets a field that Ray has deprecated.
    pytest.mark.filterwarnings("ignore:.use_push_based_shuffle:DeprecationWarning"),
]


def split(rows: int = 200, blocks: int = 10, n: int = 1) -> list[AsyncDataIterator]:
    ds = ray.data.range(rows, override_num_blocks=blocks)
    ds.context.execution_options.preserve_order = True
    return streaming_split(ds, n)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("asyncsplit-collate")]


async def no_threads() -> bool:
    return not threads()


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    asyncio.run(eventually(no_threads))


class Collate(NumpyBatchCollateFn):
    """Make a list of ids; remember whose thread did."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.threads: set[str] = set()

    def __call__(self, batch: dict[str, Any]) -> Any:
        self.threads.add(threading.current_thread().name)
        ids: list[int] = batch["id"].tolist()
        if self.bad in ids:
            raise ZeroDivisionError(self.bad)
        return ids


@pytest.mark.asyncio
@pytest.mark.parametrize("shuffle", [None, 60])
async def test_what_is_collated_ahead_is_not_finished(shuffle: int | None) -> None:
    arguments: dict[str, Any] = {
        **{"batch_size": 10, "local_shuffle_buffer_size": shuffle, "local_shuffle_seed": 5},
        **{"prefetch_batches": 4, "collate_fn": Collate()},
    }
    (it,) = split()
    async with it.iter_torch_batches(**arguments) as stream:
        seen = [await anext(stream) for _ in range(6)]
        state = it.state_dict()
        # The next one is asked for, so all of these are finished.
        rest = [batch async for batch in stream]
    assert sorted(itertools.chain(*seen, *rest)) == list(range(200))
    (again,) = split()
    again.load_state_dict(state)
    # The sixth batch was still in the loop's hands, and four more were ready.
    assert [batch async for batch in again.iter_torch_batches(**arguments)] == [seen[-1], *rest]
    assert {name[:18] for name in arguments["collate_fn"].threads} == {"asyncsplit-collate"}


@pytest.mark.asyncio
async def test_an_error_and_a_cancellation_and_leaving_early_release_the_split() -> None:
    (it,) = split()
    seen: list[int] = []
    stream = it.iter_torch_batches(batch_size=10, prefetch_batches=3, collate_fn=Collate(bad=35))
    with pytest.raises(ZeroDivisionError, match="35"):  # noqa: PT012
        async for batch in stream:
            seen += batch
    assert seen == list(range(30))
    # The failed stream is still here, and the split is free again.
    go = threading.Event()

    def wait(batch: dict[str, Any]) -> Any:
        go.wait(20)
        return batch["id"].tolist()

    async with it.iter_torch_batches(batch_size=10, collate_fn=wait) as stream:
        first = asyncio.ensure_future(anext(stream))
        await eventually(lambda: _is_running())
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go.set()
        assert await anext(stream) == list(range(10)), "cancelling lost nothing"
    async for batch in it.iter_torch_batches(batch_size=10, prefetch_batches=3, collate_fn=wait):
        assert batch == list(range(10))
        break
    assert len([b async for b in it.iter_torch_batches(dtypes=torch.float32, batch_size=20)]) == 10


async def _is_running() -> bool:
    return bool(threads())


@pytest.fixture
def _jax_is_up() -> None:
    # As a training script does before its loop: JAX looks for devices, and reads files for that.
    jax.devices()


@pytest.mark.asyncio
@pytest.mark.usefixtures("_jax_is_up")
async def test_each_framework_gets_its_tensors_and_a_dataset_its_rows() -> None:
    its = split(n=2)

    async def torches(it: AsyncDataIterator) -> list[int]:
        batches = [batch["id"] async for batch in it.iter_torch_batches(batch_size=7)]
        assert {type(batch) for batch in batches} == {torch.Tensor}
        return [int(i) for batch in batches for i in batch]

    async def jaxes(it: AsyncDataIterator) -> list[int]:
        batches = [batch["id"] async for batch in it.iter_jax_batches(batch_size=7)]
        assert all(isinstance(batch, jax.Array) for batch in batches)
        return [int(i) for batch in batches for i in batch]

    async def materialized(it: AsyncDataIterator) -> list[int]:
        ds = await it.materialize()
        ids = await asyncio.to_thread(lambda: [row["id"] for row in ds.iter_rows()])
        assert ds.count() == len(ids)
        return ids

    for read in (torches, jaxes, materialized):
        parts = await asyncio.gather(*map(read, its))
        assert all(parts)
        assert sorted(itertools.chain(*parts)) == list(range(200))


def test_a_data_loader_reads_epochs_in_its_own_process_only() -> None:
    (it,) = split()
    dataset = it.to_torch_dataset(batch_size=32, dtypes=torch.float32)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=None)
    for _ in range(2):
        rows = torch.cat([batch["id"] for batch in loader])
        np.testing.assert_array_equal(rows, np.arange(200))
    for batch in loader:
        assert len(batch["id"]) == 32
        break
    with pytest.raises(RuntimeError, match="num_workers=1: each worker of the DataLoader"):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=1)))
    with pytest.raises(ValueError, match="batch_size=0 must be 1 or more"):
        it.to_torch_dataset(batch_size=0)
