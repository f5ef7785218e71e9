"""Many consumers of one dataset, in few processes."""

from collections.abc import Callable
from typing import Any

import ray

import asyncsplit
from benchmarks.harness import (
    OURS,
    RAY,
    Bench,
    Figure,
    Round,
    Rounds,
    Target,
    close,
    cost,
    split,
    table_blocks,
    values,
)
from benchmarks.processes import Peak, coordinator_of, peaks
from benchmarks.worker import Job, checksum

PROCESSES = 4
BLOCKS, ROWS = 8, 1_024
"""Blocks for each consumer, rows in each of these."""

KWARGS = {"batch_size": 256, "batch_format": "numpy"}


def many(bench: Bench) -> list[Figure]:
    """Many consumers, several in each of four processes."""
    # What Ray's side takes grows faster than n: 512 consumers are run once, 1,024 are not.
    ray_rounds = {16: 2, 64: 0} if bench.quick else {16: 5, 64: 5, 128: 5, 512: 1, 1_024: 0}
    figures = []
    per_block: dict[str, list[float]] = {}
    coordinators: dict[str, Peak] = {}
    for n, rounds in ray_rounds.items():
        turns, seen = _read(bench, n, BLOCKS * n, bench.pick(5, 2), rounds)
        for side, peak in seen.items():
            coordinators[f"{side}, {n}"] = peak
        for side, raw in values(turns, lambda turn: 1e3 * turn.epoch_ms).items():
            per_block[f"{side}, {n}"] = [us / (BLOCKS * n) for us in raw]
        figures.append(_epoch(n, rounds, turns))
    alone = f"{OURS}, 1 with the blocks of {max(ray_rounds):,}"
    _, seen = _read(bench, 1, BLOCKS * max(ray_rounds), 1, 0)
    coordinators[alone] = seen[OURS]
    least, most = min(ray_rounds), max(ray_rounds)
    few = 16 if bench.quick else 128
    setting = (
        f"as consumers-n, for n of {', '.join(map(str, ray_rounds))}, which stands behind the side"
    )
    return [
        *figures,
        Figure(
            "consumers-per-block",
            f"{setting}: the whole epoch divided by its blocks",
            "us",
            "only one side has it",
            per_block,
            [Target(f"{OURS}, {most}", f"{OURS}, {few}", at_most=1.1)],
        ),
        Figure(
            "consumers-threads",
            f"{setting}: the most threads that the coordinator had",
            "threads",
            "only one side has it",
            {side: [float(peak.threads)] for side, peak in coordinators.items()},
            [Target(f"{OURS}, {most}", f"{OURS}, {least}", at_most=1.1)],
        ),
        Figure(
            "consumers-memory",
            f"{setting}: the largest resident memory of the coordinator; the dataset has"
            f" {BLOCKS} n blocks",
            "MiB",
            "only one side has it",
            {side: [peak.rss_mib] for side, peak in coordinators.items()},
            [
                Target(f"{OURS}, {most}", f"{OURS}, {least}", at_most=1.1),
                # What is left when what blocks take is left out.
                Target(f"{OURS}, {most}", alone, at_most=1.1),
            ],
        ),
    ]


def _epoch(n: int, ray_rounds: int, turns: Rounds) -> Figure:
    beside = {0: "; Ray's side is left out", 1: "; Ray's side once, after ours"}
    return Figure(
        f"consumers-{n}",
        f"{n} consumers in {PROCESSES} processes, {BLOCKS} blocks of {ROWS:,} rows each, numpy"
        " batches of 256 rows: the whole epoch. Ours in one event loop per process, Ray's in one"
        f" thread per consumer{beside.get(ray_rounds, '')}",
        "ms",
        "same work" if ray_rounds else "only one side has it",
        values(turns, lambda turn: turn.epoch_ms),
        [Target(RAY, OURS, at_least=8 if n == 128 else None)] if ray_rounds else [],
        details={"cost": cost(turns)},
    )


def _read(
    bench: Bench, n: int, number: int, our_rounds: int, ray_rounds: int
) -> tuple[Rounds, dict[str, Peak]]:
    ds = table_blocks(number, ROWS, 4)
    blocks = (ray.get(entry) for entry in ds.get_internal_block_refs())
    known = number * ROWS, sum(map(checksum, blocks)) % 2**64
    splits: dict[str, list[Any]] = (
        split(ds, n) if ray_rounds else {OURS: asyncsplit.streaming_split(ds, n)}
    )

    def run(side: str, *, check: bool = False) -> Round:
        job = Job(KWARGS, check=check)
        return bench.consume(side, splits[side], job, processes=min(n, PROCESSES))

    turns: dict[str, Callable[[], Round]] = {
        side: lambda side=side: run(side)  # type: ignore[misc]
        for side in splits
    }
    with peaks({side: coordinator_of(its[0]) for side, its in splits.items()}) as seen:
        for side in splits:
            if side == RAY and ray_rounds == 1:
                continue
            warm_up = run(side, check=True)
            sums = warm_up.rows, sum(loop.checksum or 0 for loop in warm_up.loops) % 2**64
            if sums != known:
                raise AssertionError(f"{side} read {sums}, not {known}: rows, checksum")
        if ray_rounds > 1:
            rounds = bench.take_turns(turns, our_rounds, rows=known[0])
        else:
            rounds = bench.take_turns({OURS: turns[OURS]}, our_rounds, rows=known[0])
            if ray_rounds:
                rounds |= bench.take_turns({RAY: turns[RAY]}, 1, rows=known[0])
    close(splits)
    return rounds, seen
