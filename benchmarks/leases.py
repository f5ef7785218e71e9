"""What leases and acknowledgements cost: the same code with and without them."""

from collections.abc import Callable
from typing import Any

import ray

import asyncsplit
from asyncsplit.core import ledger
from asyncsplit.core.liveness import Liveness
from asyncsplit.core.progress import Progress, Reading
from asyncsplit.feed import Feed
from asyncsplit.lifeline import Lifelines
from benchmarks.harness import OURS, Bench, Figure, Round, Target, close, table_blocks, values
from benchmarks.worker import Job

ON, OFF = "on", "off"


def turn_off(_: object) -> None:
    """Keep no account, in this process, of what consumers have finished with, nor watch them."""

    async def return_at_once(*_: object) -> bool:
        return False

    def nothing(*_: object) -> None:
        pass

    def begin(reading: Reading, rows: int) -> int:
        reading.fed += 1
        return 0

    off: list[tuple[Any, str, Any]] = [
        (Reading, "begin", begin),
        # What is begun counts as finished: the coordinator forgets it.
        (Reading, "progress", lambda reading, *_: Progress(0, reading.fed, reading.fed)),
        (Feed, "acknowledge", nothing),
        (Lifelines, "hold", return_at_once),
        (Lifelines, "watch", return_at_once),
        (Liveness, "hear", nothing),
        (ledger, "fingerprint", lambda before, rows: 0),
    ]
    for owner, name, instead in off:
        setattr(owner, name, instead)


def leases(bench: Bench) -> list[Figure]:
    """Leases and acknowledgements, on and off, in processes of their own."""
    without = Bench(quick=bench.quick)
    ray.get([worker.__ray_call__.remote(turn_off) for worker in without.workers(2)])
    settings: dict[str, tuple[Any, int, dict[str, Any]]] = {
        "batches": (table_blocks(16, 125_000, 4), 2, {"batch_size": 256}),
        "blocks": (table_blocks(2_000, 100, 4), 1, {"batch_size": None}),
    }
    figures = []
    for name in ["batches"] if bench.quick else [*settings]:
        ds, n, kwargs = settings[name]
        splits = {side: asyncsplit.streaming_split(ds, n) for side in (ON, OFF)}
        ray.get(splits[OFF][0]._consumer.coordinator.__ray_call__.remote(turn_off))
        job = Job({**kwargs, "batch_format": "numpy"})
        turns: dict[str, Callable[[], Round]] = {
            side: lambda where=where, its=splits[side], job=job: where.consume(  # type: ignore[misc]
                OURS, its, job
            )
            for side, where in {ON: bench, OFF: without}.items()
        }
        bench.take_turns(turns, 2)
        rounds = bench.take_turns(turns, bench.pick(25, 3), rows=ds.count())
        figures.append(
            Figure(
                f"leases-{name}",
                f"the whole epoch of workload `{name}` with leases, acknowledgements and lifelines,"
                " and without",
                "ms",
                "only one side has it",
                values(rounds, lambda turn: turn.epoch_ms),
                [Target(ON, OFF, at_most=1.05)],
            )
        )
        for its in splits.values():
            close({OURS: its})
    return figures
