"""The consumer's side: an actor with a process of its own, which iterates and takes the time.

Every side's loop does the same for each batch: remember when the first one came, count its rows,
and sleep if the workload says so. Checksums and the times of single batches are taken in runs of
their own, because they cost more than what is measured.
"""

import asyncio
import gc
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import ray

from asyncsplit.backlog import GROUP_SLICES
from asyncsplit.formats import Slab

Drive = Literal["async for", "for", "as_data_iterator"]

_END = object()
_PAGE_KIB = 4


class Loop(NamedTuple):
    """One iteration of one consumer; times are of the machine-wide monotonic clock."""

    start: float
    first: float
    end: float
    batches: int
    rows: int
    checksum: int | None = None
    gaps: tuple[float, ...] = ()
    paused_s: float = 0.0
    """Seconds of all pauses, as long as they really took."""

    @property
    def per_batch_s(self) -> float:
        """Seconds from the first batch to the end, divided by batches."""
        return (self.end - self.first) / self.batches


class Report(NamedTuple):
    """What a worker did: its loops, and what they cost the process."""

    loops: list[Loop]
    cpu_s: float
    rss_mib: float


class Ticks(NamedTuple):
    """How late a task beside the loop was woken, in seconds."""

    delays: list[float]
    batches: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """How to iterate.

    ``kwargs`` go to ``iter_batches``. ``pause_s`` is slept after each batch. ``check`` computes
    the checksum of everything, ``trace`` records the time between batches.
    """

    kwargs: dict[str, Any] = field(default_factory=dict)
    drive: Drive = "async for"
    pause_s: float = 0.0
    check: bool = False
    trace: bool = False


def checksum(batch: Any) -> int:
    """Return the sum of all bits of all values, as 64 bit integers: the same in any order."""
    columns = batch.values() if isinstance(batch, dict) else map(batch.__getitem__, _names(batch))
    total = 0
    for column in columns:
        values = np.ascontiguousarray(column.to_numpy() if not _is_array(column) else column)
        total += int(values.view(np.uint64).sum(dtype=np.uint64))
    return total % 2**64


def views(blocks: Sequence[dict[str, Any]], size: int) -> Iterator[dict[str, Any]]:
    """Cut arrays into batches as a person would by hand: the least a loader can do."""
    for block in blocks:
        rows = len(next(iter(block.values())))
        for start in range(0, rows, size):
            yield {name: values[start : start + size] for name, values in block.items()}


class Worker:
    """Consumes splits; one process, one or many consumers in it."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._arrays: list[dict[str, Any]] = []

    def ready(self) -> None:
        """Return when the process is up."""

    def collect(self) -> None:
        """Collect garbage: a process with Ray in it takes 100 ms, and would be late by that."""
        gc.collect()

    def keep(self, refs: Sequence[Any]) -> None:
        """Fetch blocks and keep them as arrays, for `iterate_by_hand`."""
        self._arrays = [
            {name: block[name].to_numpy() for name in _names(block)} for block in ray.get([*refs])
        ]

    def iterate(self, side: str, its: Sequence[Any], start_at: Sequence[float], job: Job) -> Report:
        """Read one epoch for each start time, from each of the iterators at once.

        Ours all in one event loop, or with ``for``, or as Ray's `DataIterator`; Ray's as its users
        do, in one thread each.
        """
        run: Callable[[], list[list[Loop]]]
        if side == "asyncsplit" and job.drive == "as_data_iterator":
            its = [it.as_data_iterator() for it in its]
        if side == "asyncsplit" and job.drive == "async for":
            run = lambda: asyncio.run(_together(its, start_at, job))  # noqa: E731
        elif len(its) == 1:
            run = lambda: [_epochs(its[0], start_at, job)]  # noqa: E731
        else:
            run = lambda: _threads(its, start_at, job)  # noqa: E731
        return _measured(run)

    def iterate_by_hand(self, start_at: float, size: int, trace: bool) -> Report:
        """Iterate over the arrays kept, without any loader."""

        def run() -> list[list[Loop]]:
            batches = views(self._arrays, size)
            _sleep_until(start_at)
            return [[_drain(batches, Job(trace=trace))]]

        return _measured(run)

    def execute_alone(self, dataset: Any, start_at: float) -> Report:
        """Execute the dataset and do nothing with its blocks."""

        def run() -> list[list[Loop]]:
            _sleep_until(start_at)
            start, first, rows, blocks = perf_counter(), 0.0, 0, 0
            for bundle in dataset.iter_internal_ref_bundles():
                first = first or perf_counter()
                blocks += len(bundle.blocks)
                rows += bundle.num_rows()
            return [[Loop(start, first, perf_counter(), blocks, rows)]]

        return _measured(run)

    def fetch_alone(self, refs: Sequence[Any], start_at: float) -> Report:
        """Get blocks that are here with ``ray.get``, and convert them to numpy."""

        def run() -> list[list[Loop]]:
            _sleep_until(start_at)
            start, first, rows, blocks = perf_counter(), 0.0, 0, 0
            for begin in range(0, len(refs), GROUP_SLICES):
                for block in ray.get(refs[begin : begin + GROUP_SLICES]):
                    rows += len(Slab(block, "numpy").batch(0, len(block))["c0"])
                    blocks += 1
                    first = first or perf_counter()
            return [[Loop(start, first, perf_counter(), blocks, rows)]]

        return _measured(run)

    def call(self, it: Any, times: int) -> list[float]:
        """Ask a coordinator something again and again; return seconds for each answer."""
        return asyncio.run(_call(it, times))

    def tick(self, how: str, it: Any, kwargs: dict[str, Any], epochs: int, every_s: float) -> Ticks:
        """Run a ticker beside the loop in one event loop, and say how late it was each time."""
        gc.collect()  # as before every other turn
        return asyncio.run(_tick(how, it, kwargs, epochs, every_s))


async def _together(its: Sequence[Any], start_at: Sequence[float], job: Job) -> list[list[Loop]]:
    return await asyncio.gather(*(_epochs_async(it, start_at, job) for it in its))


async def _epochs_async(it: Any, start_at: Sequence[float], job: Job) -> list[Loop]:
    loops = []
    for at in start_at:
        batches = it.iter_batches(**job.kwargs)
        await asyncio.sleep(at - perf_counter())
        loops.append(await _drain_async(batches, job))
    return loops


def _epochs(it: Any, start_at: Sequence[float], job: Job) -> list[Loop]:
    loops = []
    for at in start_at:
        batches = it.iter_batches(**job.kwargs)
        _sleep_until(at)
        loops.append(_drain(batches, job))
    return loops


def _threads(its: Sequence[Any], start_at: Sequence[float], job: Job) -> list[list[Loop]]:
    with ThreadPoolExecutor(len(its)) as threads:
        return list(threads.map(lambda it: _epochs(it, start_at, job), its))


async def _drain_async(batches: AsyncIterator[Any], job: Job) -> Loop:
    start = perf_counter()
    first, number, rows, paused_s = 0.0, 0, 0, 0.0
    if job.check or job.trace:
        seen, times = 0, [start]
        async for batch in batches:
            times.append(perf_counter())
            rows += len(batch["c0"])
            if job.check:
                seen += checksum(batch)
        return _detailed(start, times, rows, seen, job)
    async for batch in batches:
        if not number:
            first = perf_counter()
        number += 1
        rows += len(batch["c0"])
        if job.pause_s:
            began = perf_counter()
            await asyncio.sleep(job.pause_s)
            paused_s += perf_counter() - began
    return Loop(start, first, perf_counter(), number, rows, paused_s=paused_s)


def _drain(batches: Iterable[Any], job: Job) -> Loop:
    start = perf_counter()
    first, number, rows, paused_s = 0.0, 0, 0, 0.0
    if job.check or job.trace:
        seen, times = 0, [start]
        for batch in batches:
            times.append(perf_counter())
            rows += len(batch["c0"])
            if job.check:
                seen += checksum(batch)
        return _detailed(start, times, rows, seen, job)
    for batch in batches:
        if not number:
            first = perf_counter()
        number += 1
        rows += len(batch["c0"])
        if job.pause_s:
            began = perf_counter()
            time.sleep(job.pause_s)
            paused_s += perf_counter() - began
    return Loop(start, first, perf_counter(), number, rows, paused_s=paused_s)


def _detailed(start: float, times: list[float], rows: int, seen: int, job: Job) -> Loop:
    end = perf_counter()
    gaps = np.diff(times[1:]).tolist() if job.trace else ()
    first = times[1] if len(times) > 1 else end
    return Loop(
        start, first, end, len(times) - 1, rows, seen % 2**64 if job.check else None, tuple(gaps)
    )


def _measured(run: Callable[[], list[list[Loop]]]) -> Report:
    cpu = time.process_time()
    loops = run()
    cpu = time.process_time() - cpu
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return Report([loop for each in loops for loop in each], cpu, resident * _PAGE_KIB / 1024)


async def _call(it: Any, times: int) -> list[float]:
    took = []
    for _ in range(times):
        began = perf_counter()
        await it.dataset_tag()
        took.append(perf_counter() - began)
    return took


async def _tick(how: str, it: Any, kwargs: dict[str, Any], epochs: int, every_s: float) -> Ticks:
    delays: list[float] = []

    async def ticker() -> None:
        while True:
            due = perf_counter() + every_s
            await asyncio.sleep(every_s)
            delays.append(perf_counter() - due)

    began, number = perf_counter(), 0
    async with asyncio.timeout(120):
        task = asyncio.create_task(ticker())
        await asyncio.sleep(0)
        for _ in range(epochs):
            number += await _WAYS[how](it, kwargs)
        task.cancel()
    return Ticks(delays, number, perf_counter() - began)


async def _async_for(it: Any, kwargs: dict[str, Any]) -> int:
    number = 0
    async for _ in it.iter_batches(**kwargs):
        number += 1
    return number


async def _for_with_sleep(it: Any, kwargs: dict[str, Any]) -> int:
    number = 0
    for _ in it.iter_batches(**kwargs):
        number += 1
        await asyncio.sleep(0)
    return number


async def _to_thread(it: Any, kwargs: dict[str, Any]) -> int:
    number = 0
    batches = iter(it.iter_batches(**kwargs))
    while await asyncio.to_thread(next, batches, _END) is not _END:
        number += 1
    return number


async def _nothing(it: Any, kwargs: dict[str, Any]) -> int:
    await asyncio.sleep(0.5)
    return 0


_WAYS = {
    "async for": _async_for,
    "for, and sleep(0) after each batch": _for_with_sleep,
    "to_thread(next)": _to_thread,
    "ticker alone": _nothing,
}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95, p99 and the maximum."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values)}


def _sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - perf_counter()))


def _names(table: Any) -> Sequence[str]:
    return table.column_names if hasattr(table, "column_names") else list(table.columns)


def _is_array(column: Any) -> bool:
    return isinstance(column, np.ndarray)
