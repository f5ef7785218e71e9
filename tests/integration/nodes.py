"""A cluster whose nodes come, are lost or run out of memory: a program, for tests that need one.

The session's cluster has one node, which has to stay. Each line of the input names a play of
`PLAYS`, and each is answered by a line of JSON. The program ends with its input.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.data import Dataset
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import asyncsplit
from asyncsplit import AsyncDataIterator, BatchStream, SplitOptions
from tests.integration.consume import Reader, eventually, stopped
from tests.integration.modes import MODES, Mode

MB = 2**20
BLOCKS = 12
ROWS = 10
"""Of one block."""
PAYLOAD = 3 * MB // 2 // ROWS
"""Bytes of a row: a block is then no small one."""

OOM_RETRIES = 3

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "200",
    "RAY_health_check_failure_threshold": "5",
    # Ray's own default is to retry for ever, with ever longer delays.
    "RAY_task_oom_retries": str(OOM_RETRIES),
    "RAY_task_oom_retry_delay_base_ms": "100",
}


class Outcome(TypedDict):
    """What came of a failure."""

    rows: list[int]
    """Ids that were delivered, sorted."""
    errors: list[list[str]]
    """For each split that got an error, the names of its class and of that one's bases."""
    runs: list[int]
    """The first id of each block that was begun, again for each time."""


class Diary:
    """Notes in a file, for processes that get killed."""

    def __init__(self, directory: str) -> None:
        self._path = Path(tempfile.mkdtemp(dir=directory)) / "runs"
        self._path.touch()

    def note(self, first: int) -> None:
        with self._path.open("a") as file:
            file.write(f"{first}\n")

    def runs(self) -> list[int]:
        return [int(line) for line in self._path.read_text().splitlines()]


@contextmanager
def node(cluster: Cluster, environment: dict[str, str] | None = None) -> Iterator[Any]:
    """Add a node of one CPU, the only one that can execute anything; kill it at the end."""
    environment = environment or {}
    os.environ.update(environment)
    added = cluster.add_node(num_cpus=1)
    for name in environment:
        del os.environ[name]
    yield added
    if added in cluster.worker_nodes:
        cluster.remove_node(added, allow_graceful=False)


async def drain(stream: BatchStream[Any], seen: list[int]) -> None:
    """Read to the end, or to an error."""
    async with asyncio.timeout(60):
        async for batch in stream:
            seen.extend(map(int, batch["id"]))


async def outcome(
    its: list[AsyncDataIterator], streams: list[BatchStream[Any]], seen: list[int], diary: Diary
) -> Outcome:
    """Read to the end, or to an error; either way the epoch has to be over then."""

    ends = await asyncio.gather(*(drain(s, seen) for s in streams), return_exceptions=True)
    await eventually(lambda: stopped(its[0]))
    errors = [[cls.__name__ for cls in type(end).__mro__] for end in ends if end is not None]
    return Outcome(rows=sorted(seen), errors=errors, runs=diary.runs())


def gated(directory: str, **ray_remote_args: Any) -> tuple[Dataset, Diary, Path]:
    """Return a dataset, the diary of its blocks, and the file that all but the first wait for."""
    diary = Diary(directory)
    go = Path(tempfile.mkdtemp(dir=directory)) / "go"

    def produce(batch: Any) -> Any:
        first = int(batch["id"][0])
        while first >= 2 * ROWS and not go.exists():
            time.sleep(0.01)
        diary.note(first)
        return {"id": batch["id"], "payload": np.zeros((ROWS, PAYLOAD), np.uint8)}

    ds = ray.data.range(BLOCKS * ROWS, override_num_blocks=BLOCKS)
    return ds.map_batches(produce, **ray_remote_args), diary, go


async def holds(it: AsyncDataIterator, blocks: int) -> bool:
    """Tell whether the coordinator holds so many blocks with a payload."""
    return (await it.status()).held_bytes >= blocks * ROWS * PAYLOAD


def reader(it: AsyncDataIterator, node_id: str, **kwargs: Any) -> Any:
    """Start a consumer on a node."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(Reader).options(num_cpus=0, scheduling_strategy=there).remote(it, **kwargs)


class Reading(NamedTuple):
    """A dataset split in two, of which each has had its first batch."""

    its: list[AsyncDataIterator]
    streams: list[BatchStream[Any]]
    seen: list[int]
    diary: Diary


async def begin(mode: Mode, directory: str, **ray_remote_args: Any) -> Reading:
    """Read the first batches; return when all other blocks have been made."""
    ds, diary, go = gated(directory, **ray_remote_args)
    its = mode.split(ds)
    # A whole block, which goes on to be held until the next one is asked for, or half of it.
    size = 5 if mode.shuffle else None
    streams = [it.iter_batches(batch_size=size, prefetch_batches=0, **mode.reads) for it in its]
    seen = [int(i) for batch in await asyncio.gather(*map(anext, streams)) for i in batch["id"]]
    go.touch()
    if mode.routing == "demand":  # then Ray holds what nobody asks for
        await eventually(lambda: begun(diary, BLOCKS))
    else:
        await eventually(lambda: holds(its[0], BLOCKS))
    return Reading(its, streams, seen, diary)


async def begun(diary: Diary, blocks: int) -> bool:
    """Tell whether so many blocks have been begun."""
    return len(diary.runs()) >= blocks


async def lose_blocks(
    cluster: Cluster, directory: str, **ray_remote_args: Any
) -> dict[str, Outcome]:
    """Kill a node that holds blocks no consumer has fetched, in every mode; start another one."""
    with node(cluster) as lost:
        readings = [await begin(mode, directory, **ray_remote_args) for mode in MODES.values()]
        cluster.remove_node(lost, allow_graceful=False)
    with node(cluster):
        return dict(zip(MODES, [await outcome(*reading) for reading in readings], strict=True))


def full(every_ms: int) -> dict[str, str]:
    """Return what makes a node kill what executes on it: any use of memory is too much for it.

    A real shortage would depend on what else runs on the machine.
    """
    return {
        "RAY_memory_monitor_refresh_ms": str(every_ms),
        "RAY_memory_usage_threshold": "0.0001",
    }


async def run_out_of_memory(cluster: Cluster, directory: str) -> Outcome:
    """Have only a node that is out of memory."""
    diary = Diary(directory)

    def produce(batch: Any) -> Any:
        diary.note(int(batch["id"][0]))
        time.sleep(30)
        raise AssertionError("nobody killed this task")

    ds = ray.data.range(ROWS, override_num_blocks=1).map_batches(produce)
    with node(cluster, full(every_ms=100)):
        its = asyncsplit.streaming_split(ds, 2)
        return await outcome(its, [it.iter_batches() for it in its], [], diary)


class Maker:
    """Creates a split on its own node, and stays."""

    def make(self) -> list[AsyncDataIterator]:
        ds = ray.data.range(BLOCKS * ROWS, override_num_blocks=BLOCKS)
        return asyncsplit.streaming_split(ds, 2, options=SplitOptions(prefetch_bytes=1))


async def lose_the_coordinator(cluster: Cluster, directory: str) -> Outcome:
    """Kill the node on which a split was created, and with it the coordinator."""
    with node(cluster), node(cluster) as lost:
        there = NodeAffinitySchedulingStrategy(lost.node_id, soft=False)
        maker: Any = ray.remote(Maker).options(num_cpus=0, scheduling_strategy=there).remote()
        its = await maker.make.remote()
        streams = [it.iter_batches(batch_size=1) for it in its]
        seen = [int(i) for batch in await asyncio.gather(*map(anext, streams)) for i in batch["id"]]
        cluster.remove_node(lost, allow_graceful=False)
        ends = await asyncio.gather(*(drain(s, seen) for s in streams), return_exceptions=True)
    errors = [[cls.__name__ for cls in type(end).__mro__] for end in ends if end is not None]
    return Outcome(rows=sorted(seen), errors=errors, runs=[])


async def lose_a_worker(cluster: Cluster, directory: str) -> Outcome:
    """Kill the node of a consumer, of all blocks and of what made them; start another one."""
    with node(cluster) as lost:
        ds, diary, go = gated(directory)
        its = asyncsplit.streaming_split(ds, 2)
        victim = reader(its[0], lost.node_id, prefetch_batches=0)
        stream = its[1].iter_batches(batch_size=None, prefetch_batches=0)
        first, batch = await asyncio.gather(victim.next.remote(), anext(stream))
        go.touch()
        await victim.next.remote()
        await eventually(lambda: holds(its[0], BLOCKS - 1))
        assert (await its[0].status()).committed_rows[0] == ROWS
        cluster.remove_node(lost, allow_graceful=False)
    with node(cluster):
        # Before Ray knows that it is dead, whoever comes for its split is an intruder.
        with suppress(RayActorError):
            await victim.pid.remote()
        seen = [*first, *map(int, batch["id"])]
        return await outcome(its, [its[0].iter_batches(), stream], seen, diary)


PLAYS: dict[str, Any] = {
    "blocks are lost": lose_blocks,
    "blocks are lost for good": lambda *where: lose_blocks(*where, max_retries=0),
    "out of memory": run_out_of_memory,
    "the coordinator's node is lost": lose_the_coordinator,
    "a worker's node is lost": lose_a_worker,
}


def main() -> None:
    """Play what the input names."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # The paths of Ray's sockets must be short. They must also be apart from the usual ones: a
    # process that calls ray.init() would join this cluster.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="nodes-") as directory:
        os.environ.update(ENVIRONMENT, RAY_TMPDIR=directory)
        head = {"num_cpus": 0, "include_dashboard": False, "no_monitor": True}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=cluster.address, log_to_driver=False)
        for line in sys.stdin:
            # A play that hangs ends all, and so shows where.
            play = asyncio.wait_for(PLAYS[line.strip()](cluster, directory), 160)
            print(json.dumps(asyncio.run(play)), file=answers)
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
