"""What executes the dataset, or holds its blocks, is lost."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.exceptions import OwnerDiedError

import asyncsplit
from tests.integration.consume import eventually, read_epoch, stopped
from tests.integration.nodes import BLOCKS, OOM_RETRIES, ROWS

BLOCK_BYTES = 200_000
"""More than Ray keeps outside its object store."""


def payload(rows: int) -> Any:
    return np.zeros((rows, BLOCK_BYTES // rows), np.uint8)


@pytest.mark.asyncio
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("death", "compute"),
    [("exit", None), ("SIGKILL", ActorPoolStrategy(size=1))],
    ids=["a task exits", "an actor is killed"],
)
async def test_rows_delivered_before_a_worker_died_do_not_come_again(
    death: str, compute: Any, tmp_path: Path
) -> None:
    """The worker dies when half of its block has been read; Ray makes all of it again."""
    half_read, died = tmp_path / "half_read", tmp_path / "died"

    class Produce:
        def __call__(self, batch: Any) -> Iterator[Any]:
            for ids in np.split(batch["id"], 2):
                if 5 in ids and not died.exists():
                    while not half_read.exists():
                        time.sleep(0.01)
                    died.touch()
                    if death == "exit":
                        os._exit(1)
                    os.kill(os.getpid(), signal.SIGKILL)
                yield {"id": ids, "payload": payload(len(ids))}

    ds = ray.data.range(100, override_num_blocks=10)
    # Each half is a block of its own, so that the first one is there before the second.
    ds.context.target_max_block_size = BLOCK_BYTES // 2
    fn = Produce if compute else lambda batch: Produce()(batch)
    its = asyncsplit.streaming_split(ds.map_batches(fn, compute=compute), 2)

    async def read(it: asyncsplit.AsyncDataIterator) -> list[int]:
        ids: list[int] = []
        async for batch in it.iter_batches(batch_size=None):
            ids += batch["id"].tolist()
            if 0 in ids:
                half_read.touch()
        return ids

    assert sorted(chain(*await asyncio.gather(*map(read, its)))) == list(range(100))
    assert died.exists()


class Owner:
    """Owns the blocks of a dataset."""

    def make(self, blocks: int) -> list["ray.ObjectRef[Any]"]:
        return [
            ray.put(
                pa.table(
                    {
                        "id": np.arange(ROWS * block, ROWS * (block + 1)),
                        "payload": pa.array([bytes(BLOCK_BYTES // ROWS)] * ROWS),
                    }
                )
            )
            for block in range(blocks)
        ]


@pytest.mark.asyncio
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("mapped", [False, True])
async def test_blocks_whose_owner_died_are_an_error_for_all(mapped: bool) -> None:
    owner: Any = ray.remote(Owner).options(num_cpus=0).remote()
    refs = await owner.make.remote(8)
    ds: Dataset = ray.data.from_arrow_refs(refs)
    if mapped:
        ds = ds.map_batches(lambda batch: batch)
    its = asyncsplit.streaming_split(ds, 2)
    assert len(list(chain(*await read_epoch(its)))) == 8 * ROWS

    async def lost() -> bool:
        try:
            await refs[-1]
        except OwnerDiedError:
            return True
        return False

    ray.kill(owner)
    await eventually(lost)
    errors = await asyncio.gather(*(read_epoch([it]) for it in its), return_exceptions=True)
    assert [type(error) for error in errors] == [OwnerDiedError, OwnerDiedError]
    await eventually(lambda: stopped(its[0]))


@pytest.mark.deep
def test_blocks_lost_with_their_node_are_produced_again(play: Any) -> None:
    for mode, outcome in play("blocks are lost").items():
        assert outcome["errors"] == [], mode
        assert outcome["rows"] == list(range(BLOCKS * ROWS)), mode
        assert len(outcome["runs"]) > BLOCKS, f"they were lost: {mode}"


@pytest.mark.deep
def test_lost_blocks_that_cannot_be_produced_again_are_an_error_for_all(play: Any) -> None:
    for mode, outcome in play("blocks are lost for good").items():
        assert len(outcome["errors"]) == 2, mode
        for classes in outcome["errors"]:
            # On demand the last of them may be lost as it is made.
            assert ("RayError" if mode == "demand" else "ObjectLostError") in classes, mode
        before = list(range(2 * ROWS))
        if mode == "local shuffle":  # its first batch is half a block
            assert len(outcome["rows"]) == len(set(outcome["rows"]).intersection(before)) > 0
        else:
            assert outcome["rows"] == before, f"what was delivered before: {mode}"
        assert len(outcome["runs"]) == BLOCKS, mode


def test_running_out_of_memory_again_and_again_is_an_error_for_all(play: Any) -> None:
    outcome = play("out of memory")
    assert [classes[0] for classes in outcome["errors"]] == ["OutOfMemoryError"] * 2
    assert outcome["rows"] == []
    # Fewer if the task was killed before it got to its block.
    assert len(outcome["runs"]) <= 1 + OOM_RETRIES


def test_the_loss_of_the_coordinators_node_is_an_error_for_all(play: Any) -> None:
    outcome = play("the coordinator's node is lost")
    assert [classes[0] for classes in outcome["errors"]] == ["CoordinatorLostError"] * 2


def test_a_worker_lost_with_its_node_and_all_blocks_is_replaced(play: Any) -> None:
    outcome = play("a worker's node is lost")
    assert outcome["errors"] == []
    assert outcome["rows"] == list(range(BLOCKS * ROWS))
