"""Failures in which the mode plays no part end alike in every mode."""

import asyncio
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data import Dataset
from ray.exceptions import WorkerCrashedError

from asyncsplit import AsyncDataIterator, CoordinatorLostError
from tests.integration.consume import read, read_epoch
from tests.integration.modes import MODES, Mode

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.usefixtures("ray_cluster"),
    # Ray 2.60 has no other way yet to limit the retries of a map task.
    pytest.mark.filterwarnings("ignore:`ray_remote_args` is deprecated"),
]


def mortal(directory: Path) -> Dataset:
    """Return a dataset one of whose tasks ends its process: once, or each time if told so."""

    def produce(batch: Any) -> Any:
        died = directory / "died"
        if 50 in batch["id"] and ((directory / "deadly").exists() or not died.exists()):
            died.touch()
            os._exit(1)
        return batch

    return ray.data.range(100, override_num_blocks=10).map_batches(produce, max_retries=1)


async def ends(its: Sequence[AsyncDataIterator], **kwargs: Any) -> list[type[BaseException]]:
    errors = await asyncio.gather(*(read(it, **kwargs) for it in its), return_exceptions=True)
    return [type(error) for error in errors if isinstance(error, BaseException)]


async def die_and_die(mode: Mode, directory: Path) -> None:
    its = mode.split(mortal(directory), prefetch_bytes=1)
    rows = await read_epoch(its, batch_size=5, **mode.reads)
    assert (directory / "died").exists()
    assert sorted(chain(*rows)) == list(range(100)), "what was retried comes once"

    (directory / "deadly").touch()
    assert await ends(its, batch_size=5, **mode.reads) == [WorkerCrashedError] * 2
    (directory / "deadly").unlink()

    streams = [it.iter_batches(batch_size=5, **mode.reads) for it in its]
    await asyncio.gather(*map(anext, streams))
    ray.kill(its[0]._consumer.coordinator)
    for stream in streams:
        with pytest.raises(CoordinatorLostError, match="Create a new split"):
            async for _ in stream:
                pass


@pytest.mark.deep
async def test_the_dataset_dies_and_then_the_coordinator_whatever_the_mode(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        for number, mode in enumerate(MODES.values()):
            directory = tmp_path / str(number)
            directory.mkdir()
            group.create_task(die_and_die(mode, directory))
