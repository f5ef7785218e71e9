"""What metrics cost, and what leases and acknowledgements do: with them and without."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import Dataset

import asyncsplit
from asyncsplit import SplitOptions, TelemetryConfig
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


@dataclass
class Setting:
    """A dataset, and how it is read."""

    name: str
    ds: Dataset
    n: int
    job: Job


def telemetry(bench: Bench) -> list[Figure]:
    """Return what the metrics cost when nobody looks at them."""
    off = SplitOptions(telemetry=TelemetryConfig(enabled=False))
    figures = []
    for setting in _settings(bench):
        its = {
            ON: asyncsplit.streaming_split(setting.ds, setting.n),
            OFF: asyncsplit.streaming_split(setting.ds, setting.n, options=off),
        }
        what = "the metrics endpoint, which nobody scrapes"
        sides = {side: (bench, its[side]) for side in its}
        figures.append(_compare(bench, setting, "telemetry", what, sides, at_most=1.02))
    return figures


def leases(bench: Bench) -> list[Figure]:
    """Return what leases and acknowledgements cost; on and off in processes of their own."""
    without = Bench(quick=bench.quick)
    ray.get([worker.__ray_call__.remote(turn_off) for worker in without.workers(2)])
    figures = []
    for setting in _settings(bench):
        its = {side: asyncsplit.streaming_split(setting.ds, setting.n) for side in (ON, OFF)}
        ray.get(its[OFF][0]._consumer.coordinator.__ray_call__.remote(turn_off))
        what = "leases, acknowledgements and lifelines"
        sides = {ON: (bench, its[ON]), OFF: (without, its[OFF])}
        figures.append(_compare(bench, setting, "leases", what, sides, at_most=1.05))
    return figures


def _settings(bench: Bench) -> Iterator[Setting]:
    """Yield the datasets of workloads `batches` and `blocks`."""
    kwargs = {"batch_size": 256, "batch_format": "numpy"}
    yield Setting("batches", table_blocks(16, 125_000, 4), 2, Job(kwargs))
    if not bench.quick:
        yield Setting("blocks", table_blocks(2_000, 100, 4), 1, Job({**kwargs, "batch_size": None}))


def _compare(
    bench: Bench,
    setting: Setting,
    name: str,
    what: str,
    sides: dict[str, tuple[Bench, Sequence[Any]]],
    at_most: float,
) -> Figure:
    turns: dict[str, Callable[[], Round]] = {
        side: lambda where=where, its=its: where.consume(OURS, its, setting.job)  # type: ignore[misc]
        for side, (where, its) in sides.items()
    }
    bench.take_turns(turns, 2)
    rounds = bench.take_turns(turns, bench.pick(25, 3), rows=setting.ds.count())
    for _, its in sides.values():
        close({OURS: its})
    return Figure(
        f"{name}-{setting.name}",
        f"the whole epoch of workload `{setting.name}` with and without {what}",
        "ms",
        "only one side has it",
        values(rounds, lambda turn: turn.epoch_ms),
        [Target(ON, OFF, at_most=at_most)],
    )
