"""schema() before, during and after execution; never two executors; context and tag."""

import asyncio
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.data import Dataset

import asyncsplit
from asyncsplit import AsyncDataIterator, ExecutionActiveError, SplitOptions
from tests.integration.consume import eventually, read, stopped

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


def unknown_schema(blocks: int = 10) -> Dataset:
    """Return a dataset whose schema only an execution can tell."""
    return ray.data.range(1000, override_num_blocks=blocks).map_batches(
        lambda batch: {"id": batch["id"], "twice": batch["id"] * 2.0}
    )


async def names(it: AsyncDataIterator, **kwargs: Any) -> list[str]:
    schema = await it.schema(**kwargs)
    assert schema is not None
    return schema.names


async def requests(it: AsyncDataIterator) -> dict[str, int]:
    return (await it.status()).schema_requests


async def test_concurrent_first_callers_compute_it_once() -> None:
    its = asyncsplit.streaming_split(unknown_schema(), 2)
    schemas = await asyncio.gather(*(its[i % 2].schema() for i in range(8)))
    for schema in schemas:
        assert schema is not None
        assert schema.names == ["id", "twice"]
        assert schema.types == [pa.int64(), pa.float64()]
    assert await requests(its[0]) == {"hit": 7, "miss": 1, "observed": 0, "rejected": 0}


async def test_during_an_epoch_it_is_refused_unless_cached() -> None:
    (it,) = asyncsplit.streaming_split(unknown_schema(), 1, options=SplitOptions(prefetch_bytes=1))
    async with it.iter_batches(batch_size=1) as stream:
        await anext(stream)
        with pytest.raises(
            ExecutionActiveError, match=r"Cannot call schema\(\) during active dataset execution"
        ):
            await it.schema()
        with pytest.raises(RuntimeError):
            await it.schema()
        assert await names(it, during_execution="observed") == ["id", "twice"]
    await eventually(lambda: stopped(it))
    assert await names(it) == ["id", "twice"]
    assert await requests(it) == {"hit": 0, "miss": 1, "observed": 1, "rejected": 2}
    async with it.iter_batches(batch_size=1) as stream:
        await anext(stream)
        assert await names(it) == ["id", "twice"]
    assert (await requests(it))["hit"] == 1


async def test_it_is_refused_also_where_the_dataset_holds_its_blocks() -> None:
    ds = ray.data.from_items([{"id": i} for i in range(100)], override_num_blocks=10)
    (it,) = asyncsplit.streaming_split(ds, 1, options=SplitOptions(prefetch_bytes=1))
    async with it.iter_batches(batch_size=1) as stream:
        await anext(stream)
        with pytest.raises(ExecutionActiveError):
            await it.schema()
        assert await names(it, during_execution="observed") == ["id"]


async def test_waiting_for_the_epoch_to_end() -> None:
    (it,) = asyncsplit.streaming_split(unknown_schema(), 1, options=SplitOptions(prefetch_bytes=1))
    async with it.iter_batches(batch_size=1) as stream:
        await anext(stream)
        schema = asyncio.create_task(names(it, during_execution="wait"))
        await asyncio.wait({schema}, timeout=0.3)
        assert not schema.done()
    assert await schema == ["id", "twice"]


async def test_racing_with_epoch_starts_never_runs_two_executors() -> None:
    for _ in range(3):
        (it,) = asyncsplit.streaming_split(unknown_schema(4), 1)
        outcomes = await asyncio.gather(
            *(it.schema() for _ in range(3)), read(it), it.schema(), return_exceptions=True
        )
        rows = outcomes.pop(3)
        assert sorted(rows) == list(range(1000))  # type: ignore[arg-type]
        assert all(
            isinstance(outcome, ExecutionActiveError) or outcome.names == ["id", "twice"]  # type: ignore[union-attr]
            for outcome in outcomes
        )
        status = await it.status()
        assert status.schema_requests["miss"] <= 1


async def test_schema_of_a_failing_dataset_raises_its_error() -> None:
    def fail(batch: Any) -> Any:
        raise KeyError("no such column")

    (it,) = asyncsplit.streaming_split(ray.data.range(10).map_batches(fail), 1)
    with pytest.raises(KeyError, match="no such column"):
        await it.schema()


async def test_context_and_tag_are_the_datasets_own_and_a_bad_mode_is_refused() -> None:
    ds = ray.data.range(10)
    ds.set_name("flights")
    ds.context.target_max_block_size = 12_345_678
    ds.context.set_config("asyncsplit-test", "here")
    its = asyncsplit.streaming_split(ds, 2)
    context = await its[0].get_context()
    assert context.target_max_block_size == 12_345_678
    assert context.get_config("asyncsplit-test") == "here"
    assert context.raise_original_map_exception is ds.context.raise_original_map_exception
    tag = await its[1].dataset_tag()
    assert tag["dataset"].startswith("flights_")
    assert tag["split_index"] == "1"
    with pytest.raises(ValueError, match="during_execution='maybe'"):
        await its[0].schema(during_execution="maybe")  # type: ignore[arg-type]
