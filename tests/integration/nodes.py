"""A cluster whose nodes come, are lost or run out of memory: a program, for tests that need one.

The session's cluster has one node, which has to stay. Each line of the input names a play of
`PLAYS`, and each is answered by a line of JSON. The program ends with its input.
"""

import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast
from urllib.request import urlopen

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.data import Dataset
from ray.exceptions import RayActorError
from ray.experimental import get_object_locations
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
    # Soon, but not before a node that gets no CPU for a while answers.
    "RAY_health_check_period_ms": "200",
    "RAY_health_check_failure_threshold": "15",
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
    """Add a node of one CPU, which the driver's node has not; kill it at the end."""
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
    return (
        ray.remote(Reader).options(num_cpus=0, scheduling_strategy=on(node_id)).remote(it, **kwargs)
    )


def on(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


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
        there = {"num_cpus": 0, "scheduling_strategy": on(lost.node_id)}
        maker: Any = ray.remote(Maker).options(**there).remote()
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


class Blocks(TypedDict):
    """How many blocks came to consumers, by where they were produced."""

    local: int
    remote: int
    unknown: int


class Places(TypedDict):
    """What is where, with two nodes beside the driver's."""

    followed: Blocks
    """With hints that say where the consumers are."""
    swapped: Blocks
    """With hints that say the opposite."""
    coordinator: list[str]
    """The node that it was to run on, and the one it ran on."""
    ahead: list[int]
    """Which of 8 blocks are on the consumer's node while it holds block 0."""


class Pair:
    """Consumes a split, and then another one."""

    def __init__(self, its: list[AsyncDataIterator]) -> None:
        self._streams = [it.iter_batches(batch_size=None, prefetch_batches=0) for it in its]

    async def begin(self, which: int) -> None:
        await anext(self._streams[which])

    async def rest(self, which: int) -> None:
        async for _ in self._streams[which]:
            pass


async def located(it: AsyncDataIterator) -> Blocks:
    """Return what the metrics say of where blocks were."""
    url = await it.metrics_url()
    assert url is not None
    text = await asyncio.to_thread(lambda: urlopen(url).read().decode())
    counts = re.findall(r'located_blocks_total\{.*location="(\w+)"\} (\d+)', text)
    return cast("Blocks", {where: int(count) for where, count in counts})


async def place(cluster: Cluster, directory: str) -> Places:
    """Have blocks made on two nodes and read there, with hints and with wrong ones."""
    here = tempfile.mkdtemp(dir=directory)

    def produce(batch: Any) -> Any:
        # Else one node could be through before the other has started a process.
        Path(here, ray.get_runtime_context().get_node_id()).touch()
        while len(list(Path(here).iterdir())) < 2:
            time.sleep(0.01)
        return {"id": batch["id"], "payload": np.zeros((ROWS, PAYLOAD), np.uint8)}

    ds = ray.data.range(2 * BLOCKS * ROWS, override_num_blocks=2 * BLOCKS).map_batches(produce)
    with node(cluster) as one, node(cluster) as other:
        nodes = [one.node_id, other.node_id]
        options = SplitOptions(coordinator_node_id=nodes[1])
        ways = [
            asyncsplit.streaming_split(ds, 2, locality_hints=hints, options=options)
            for hints in (nodes, nodes[::-1])
        ]
        readers: list[Any] = [
            ray.remote(Pair).options(num_cpus=0, scheduling_strategy=on(at)).remote(list(its))
            for at, its in zip(nodes, zip(*ways, strict=True), strict=True)
        ]
        blocks = []
        for which, (it, _) in enumerate(ways):
            await asyncio.gather(*(reader.begin.remote(which) for reader in readers))
            await eventually(lambda: holds(it, 2 * BLOCKS), 60)  # noqa: B023 - awaited at once
            await asyncio.gather(*(reader.rest.remote(which) for reader in readers))
            blocks.append(await located(it))
        runs_on = (await ways[0][0].status()).node_id
        ahead = await fetch_ahead(ds.limit(8 * ROWS).materialize())
    return Places(
        followed=blocks[0], swapped=blocks[1], coordinator=[nodes[1], runs_on], ahead=ahead
    )


async def fetch_ahead(ds: Dataset) -> list[int]:
    """Read a block of other nodes, and no more; return which are on this one in the end."""
    bundles = list(ds.iter_internal_ref_bundles())
    refs: list[Any] = [ref for bundle in bundles for ref in bundle.block_refs]
    me = ray.get_runtime_context().get_node_id()

    def here() -> list[int]:
        places = get_object_locations(refs)
        return [i for i, ref in enumerate(refs) if me in places[ref]["node_ids"]]

    async def three_more() -> bool:
        return {1, 2, 3} <= set(here())

    (it,) = asyncsplit.streaming_split(ds, 1)
    assert here() == []
    async with it.iter_batches(batch_size=None, prefetch_batches=3) as stream:
        await anext(stream)
        await eventually(three_more, 60)
        return here()


PLAYS: dict[str, Any] = {
    "blocks are lost": lose_blocks,
    "blocks are lost for good": lambda *where: lose_blocks(*where, max_retries=0),
    "out of memory": run_out_of_memory,
    "the coordinator's node is lost": lose_the_coordinator,
    "a worker's node is lost": lose_a_worker,
    "blocks and nodes": place,
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
            # Ray may have any node it believes alive create an actor, which dies with that node.
            cluster.wait_for_nodes()
            # A play that hangs ends all, and so shows where.
            play = asyncio.wait_for(PLAYS[line.strip()](cluster, directory), 160)
            print(json.dumps(asyncio.run(play)), file=answers)
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
