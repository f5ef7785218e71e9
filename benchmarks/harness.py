"""What workloads share: sides that take turns, the same work asserted, figures with targets."""

import asyncio
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
from ray.data import Dataset

import asyncsplit
from benchmarks.worker import Drive, Job, Loop, Report, Worker

OURS, RAY = "asyncsplit", "ray"

Kind = Literal["same work", "only one side has it"]

ARRIVE_S = 0.05
"""How far ahead consumers are told when to start, so that they start together."""


@dataclass(frozen=True)
class Target:
    """A bound for how many times larger one side's figure is than another's."""

    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool:
        """Tell whether a ratio meets the target."""
        return not (
            (self.at_least is not None and ratio < self.at_least)
            or (self.at_most is not None and ratio > self.at_most)
        )

    def __str__(self) -> str:
        """Say what is asked for."""
        bound = f"at least {self.at_least:g}" if self.at_least else f"at most {self.at_most:g}"
        return f"{self.over} / {self.under} {bound}"


@dataclass
class Figure:
    """One thing measured on several sides, every raw value of it; smaller is better."""

    name: str
    what: str
    unit: str
    kind: Kind
    raw: dict[str, list[float]]
    targets: Sequence[Target] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    """For a side, what its median should stay under."""
    details: dict[str, Any] = field(default_factory=dict)

    def ratio(self, over: str, under: str) -> float:
        """Return how many times larger the one side's median is."""
        return statistics.median(self.raw[over]) / statistics.median(self.raw[under])

    def to_json(self) -> dict[str, Any]:
        """Return everything, with summaries, ready for JSON."""
        summary = {
            side: {"min": min(raw), "median": statistics.median(raw), "max": max(raw)}
            for side, raw in self.raw.items()
        }
        compared = [(target.over, target.under, target) for target in self.targets]
        if not compared and {OURS, RAY} <= self.raw.keys():
            compared = [(RAY, OURS, Target(RAY, OURS))]
        ratios = []
        for over, under, target in compared:
            ratio = self.ratio(over, under)
            asked = target.at_least is not None or target.at_most is not None
            paired = [a / b for a, b in zip(self.raw[over], self.raw[under], strict=False) if b]
            ratios.append(
                {
                    "over": over,
                    "under": under,
                    "ratio_of_medians": ratio,
                    "ratio_of_minima": min(self.raw[over]) / min(self.raw[under]),
                    "by_round": {"min": min(paired), "max": max(paired)} if paired else None,
                    "target": str(target) if asked else None,
                    "met": target.met(ratio) if asked else None,
                }
            )
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "class": self.kind,
            "summary": summary,
            "ratios": ratios,
            "limits": [
                {
                    "side": side,
                    "limit": limit,
                    "median": summary[side]["median"],
                    "met": summary[side]["median"] < limit,
                }
                for side, limit in self.limits.items()
            ],
            "raw": self.raw,
            "details": self.details,
        }


@dataclass
class Round:
    """One turn of one side: what each of its workers reported."""

    reports: list[Report]

    @property
    def loops(self) -> list[Loop]:
        """The loops of all consumers."""
        return [loop for report in self.reports for loop in report.loops]

    @property
    def rows(self) -> int:
        """Rows of all consumers together."""
        return sum(loop.rows for loop in self.loops)

    @property
    def per_batch_us(self) -> float:
        """Microseconds from the first batch to the end per batch, averaged over consumers."""
        return 1e6 * statistics.mean(loop.per_batch_s for loop in self.loops if loop.batches)

    @property
    def epoch_ms(self) -> float:
        """Milliseconds from the first consumer's start to the last one's end."""
        return 1e3 * (max(x.end for x in self.loops) - min(x.start for x in self.loops))


Rounds = dict[str, list[Round]]


class Bench:
    """Holds the workers, and runs the sides of a workload in turns."""

    def __init__(self, *, quick: bool) -> None:
        """Start without workers."""
        self.quick = quick
        self.rounds = 3 if quick else 7
        self._workers: list[Any] = []

    def pick(self, full: int, quick: int) -> int:
        """Return one of two sizes."""
        return quick if self.quick else full

    def workers(self, n: int) -> list[Any]:
        """Return n actors, each in a process of its own; they are used again and again."""
        actor = ray.remote(Worker).options(num_cpus=0)
        self._workers += [actor.remote() for _ in range(n - len(self._workers))]
        ray.get([worker.ready.remote() for worker in self._workers])
        return self._workers[:n]

    def consume(
        self,
        side: str,
        its: Sequence[Any],
        job: Job,
        *,
        processes: int | None = None,
        arrivals: Sequence[Sequence[float]] | None = None,
    ) -> Round:
        """Let every iterator be read once, in as many processes or in fewer.

        ``arrivals`` gives for each process the seconds from now at which its epochs start.
        """
        workers = self.workers(processes or len(its))
        now = perf_counter() + ARRIVE_S
        starts = [[now + after for after in each] for each in arrivals or [[0.0]] * len(workers)]
        return Round(
            ray.get(
                [
                    worker.iterate.remote(side, list(its[i :: len(workers)]), starts[i], job)
                    for i, worker in enumerate(workers)
                ]
            )
        )

    def compare(
        self,
        ds: Dataset,
        n: int,
        kwargs: dict[str, Any],
        *,
        others: Mapping[str, Callable[[], Round]] | None = None,
        rounds: int | None = None,
        drive: Drive = "async for",
        processes: int | None = None,
        trace: bool = False,
    ) -> Rounds:
        """Read whole epochs of a dataset with ours and Ray's iterators in turns.

        The first turn of each is the warm-up, in which every value goes into a checksum. All
        must agree on that, and on the number of rows in every turn.
        """
        splits = split(ds, n)
        job = Job(kwargs, drive)
        sides: dict[str, Callable[[Job], Round]] = {
            side: lambda job, side=side, its=its: self.consume(  # type: ignore[misc]
                side, its, job, processes=processes
            )
            for side, its in splits.items()
        }
        checks = {side: run(Job(kwargs, drive, check=True)) for side, run in sides.items()}
        sums = {
            side: (each.rows, sum(loop.checksum or 0 for loop in each.loops) % 2**64)
            for side, each in checks.items()
        }
        if len(set(sums.values())) != 1:
            raise AssertionError(f"the sides did not do the same work: rows, checksums {sums}")
        turns: dict[str, Callable[[], Round]] = {
            side: lambda run=run: run(job)  # type: ignore[misc]
            for side, run in sides.items()
        }
        measured = self.take_turns({**turns, **(others or {})}, rounds, rows=sums[OURS][0])
        if trace:
            for side, run in sides.items():
                measured[f"{side} traced"] = [run(Job(kwargs, drive, trace=True))]
        close(splits)
        return measured

    def take_turns(
        self,
        turns: Mapping[str, Callable[[], Round]],
        rounds: int | None = None,
        *,
        rows: int | None = None,
    ) -> Rounds:
        """Run the sides one after the other, again and again, and check the number of rows."""
        measured: Rounds = {side: [] for side in turns}
        for _ in range(rounds or self.rounds):
            for side, run in turns.items():
                ray.get([worker.collect.remote() for worker in self._workers])
                wait_for_quiet(0.3 if self.quick else 3.0)
                turn = run()
                if rows is not None and turn.rows != rows:
                    raise AssertionError(f"{side} read {turn.rows} rows of {rows}")
                measured[side].append(turn)
        return measured


def wait_for_quiet(at_most_s: float) -> None:
    """Let a burst of other work pass, for a while: it would fall on one side alone."""
    give_up = perf_counter() + at_most_s
    while perf_counter() < give_up:
        before = _idle_s()
        time.sleep(0.1)
        if _idle_s() - before > 0.07 * (os.cpu_count() or 1):
            return


def _idle_s() -> float:
    with open("/proc/stat") as file:
        return int(file.readline().split()[4]) / os.sysconf("SC_CLK_TCK")


def split(ds: Dataset, n: int) -> dict[str, list[Any]]:
    """Split one dataset object by both sides."""
    return {
        OURS: list(asyncsplit.streaming_split(ds, n)),
        RAY: list(ds.streaming_split(n)),
    }


def close(splits: Mapping[str, Sequence[Any]]) -> None:
    """Stop our executors; the coordinators of all sides end with the iterators."""
    for side, its in splits.items():
        if side != RAY:
            asyncio.run(its[0].shutdown())


def table_blocks(blocks: int, rows: int, columns: int) -> Dataset:
    """Make a dataset in memory: float64 columns c0, c1, ... of random values, so many rows each."""
    random_values = np.random.default_rng(7)
    names = [f"c{i}" for i in range(columns)]
    return ray.data.from_arrow(
        [
            pa.table(dict(zip(names, random_values.random((columns, rows)), strict=True)))
            for _ in range(blocks)
        ]
    )


def values(rounds: Rounds, value: Callable[[Round], float]) -> dict[str, list[float]]:
    """Return one figure of each turn, by side."""
    return {
        side: [value(turn) for turn in turns]
        for side, turns in rounds.items()
        if not side.endswith(" traced")
    }


def cost(rounds: Rounds) -> dict[str, Any]:
    """Return CPU seconds and resident memory of the consumer processes, by side."""
    return {
        side: {
            "consumers_cpu_s": [sum(report.cpu_s for report in turn.reports) for turn in turns],
            "largest_consumer_rss_mib": max(r.rss_mib for turn in turns for r in turn.reports),
        }
        for side, turns in rounds.items()
    }


def arrivals(consumers: int, epochs: int, spacing_s: float, jitter_s: float) -> list[list[float]]:
    """Return when each consumer starts each epoch: the same random times for all sides."""
    chance = random.Random(5)
    return [
        [epoch * spacing_s + chance.random() * jitter_s for epoch in range(epochs)]
        for _ in range(consumers)
    ]


def conditions(*, quick: bool) -> dict[str, Any]:
    """Describe where and when a workload ran."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "event_loop": "asyncio, stock selector loop",
        "versions": {
            "asyncsplit": asyncsplit.__version__,
            "ray": ray.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pandas": pd.__version__,
            "pyarrow": pa.__version__,
        },
    }
