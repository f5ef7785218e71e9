"""What a loader without Ray takes for the table of `batches`."""

import importlib.util
import time
import warnings
from collections.abc import Iterable
from time import perf_counter
from typing import Any, Literal

import ray

import asyncsplit
from benchmarks.harness import ARRIVE_S, OURS, Bench, Figure, Round, table_blocks, values
from benchmarks.worker import Job, Loop, Report, checksum

How = Literal["row by row", "batch by batch"]

LOADERS: dict[str, How] = {
    "DataLoader": "row by row",
    "DataLoader, batches sampled": "batch by batch",
}


class Loaders:
    """Holds a share of the table as tensors, in a process of its own."""

    def keep(self, blocks: list[Any]) -> None:
        """Copy blocks into a table of tensors."""
        import pyarrow as pa
        import torch
        from torch.utils.data import TensorDataset

        table = pa.concat_tables(ray.get(blocks))
        self._names = table.column_names
        self._table = TensorDataset(*(torch.tensor(table[name].to_numpy()) for name in self._names))

    def iterate(self, how: How, start_at: float, size: int, check: bool) -> Report:
        """Iterate over the share once, without worker processes."""
        from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

        loader: Iterable[Any]
        if how == "row by row":
            loader = DataLoader(self._table, batch_size=size)
        else:
            sampler = BatchSampler(SequentialSampler(self._table), size, drop_last=False)
            loader = DataLoader(self._table, sampler=sampler, batch_size=None)
        cpu = time.process_time()
        time.sleep(max(0.0, start_at - perf_counter()))
        loop = self._check(loader) if check else _drain(loader)
        return Report([loop], time.process_time() - cpu, 0.0)

    def _check(self, loader: Iterable[Any]) -> Loop:
        total, rows = 0, 0
        for batch in loader:
            rows += len(batch[0])
            total += checksum({n: x.numpy() for n, x in zip(self._names, batch, strict=True)})
        return Loop(0.0, 0.0, 0.0, 0, rows, total)


def orientation(bench: Bench) -> list[Figure]:
    """The DataLoader of torch over a table in memory; no Ray Data, no other process."""
    if not importlib.util.find_spec("torch"):
        warnings.warn(
            "orientation is left out: torch is not installed, `pip install 'asyncsplit[torch]'`",
            stacklevel=2,
        )
        return []
    rows, size, n = bench.pick(2_000_000, 200_000), 256, 2
    ds = table_blocks(16, rows // 16, 4)
    blocks = ds.get_internal_block_refs()
    its = asyncsplit.streaming_split(ds, n)
    loaders = [ray.remote(Loaders).options(num_cpus=0).remote() for _ in range(n)]
    ray.get([loader.keep.remote(blocks[i::n]) for i, loader in enumerate(loaders)])

    def run(side: str, *, check: bool = False) -> Round:
        if side == OURS:
            return bench.consume(OURS, its, Job({"batch_size": size}, check=check))
        at = perf_counter() + ARRIVE_S
        return Round(ray.get([x.iterate.remote(LOADERS[side], at, size, check) for x in loaders]))

    sides = [OURS, *LOADERS]
    sums = set()
    for side in sides:
        loops = run(side, check=True).loops
        sums.add((sum(x.rows for x in loops), sum(x.checksum or 0 for x in loops) % 2**64))
    if len(sums) != 1:
        raise AssertionError(f"the sides did not do the same work: rows, checksums {sums}")
    rounds = bench.take_turns(
        {side: lambda side=side: run(side) for side in sides},  # type: ignore[misc]
        bench.pick(5, 1),
        rows=rows,
    )
    return [
        Figure(
            "orientation",
            f"{rows:,} rows of 4 float64, batches of {size} rows, {n} consumers: time from first"
            " batch to end, divided by batches. Ours as in `batches`, numpy; torch's DataLoader"
            " over a TensorDataset of the same table, already in the consumer's memory,"
            " num_workers=0: as it is used by default, and with a BatchSampler as sampler, which"
            " indexes whole batches",
            "us",
            "only one side has it",
            values(rounds, lambda turn: turn.per_batch_us),
        )
    ]


def _drain(batches: Iterable[Any]) -> Loop:
    start = perf_counter()
    first, number, rows = 0.0, 0, 0
    for batch in batches:
        if not number:
            first = perf_counter()
        number += 1
        rows += len(batch[0])
    return Loop(start, first, perf_counter(), number, rows)
