"""What processes and the object store hold while far more data than fits streams through.

Each side has a Ray cluster of its own with a small object store, in a process of its own:
``python -m benchmarks.stream`` runs one side and prints what it saw.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import ray

import asyncsplit
from benchmarks.harness import OURS, RAY, Bench, Figure, Target
from benchmarks.processes import coordinator_of, held

ROOT = Path(__file__).parent.parent
BYTES, FLOATS = 64 * 1024, 1024
ROW_BYTES = BYTES + 8 * FLOATS
BLOCK_ROWS, BATCH = 256, 64
CONSUMERS = 2
EVERY_S = 0.25
MB = 10**6
NOT_ABOVE = 0.98
"""Ray's figure over ours: one run of each does not tell smaller differences apart."""


class Reading(NamedTuple):
    """What a consumer did; times are of the machine-wide monotonic clock."""

    first: float
    end: float
    rows: int
    checksum: int


class Sample(NamedTuple):
    """What was held at a time: of consumers, the one that holds most."""

    at: float
    consumer_mib: float
    consumer_rss_mib: float
    coordinator_mib: float
    coordinator_rss_mib: float
    store_mib: float


class Reader:
    """Consumes a split in a process of its own."""

    def pid(self) -> int:
        """Return the process id."""
        return os.getpid()

    def read(self, side: str, it: Any, pause_s: float) -> Reading:
        """Read one epoch; ours with `async for`, Ray's with `for`."""
        batches = it.iter_batches(batch_size=BATCH, batch_format="numpy")
        if side == OURS:
            return asyncio.run(_drain_async(batches, pause_s))
        return _drain(batches, pause_s)


def stream(bench: Bench) -> list[Figure]:
    """A stream of 20 GB through an object store of 1 GB."""
    if bench.quick:
        return _stream("stream", 1_000, 400, 0.0)
    # Consumers that pause are slower than the dataset, so what may be kept ahead of them is.
    return _stream("stream", 20_000, 1_000, 0.0) + _stream("stream-slow", 5_000, 1_000, 0.05)


def _stream(name: str, size_mb: int, store_mb: int, pause_s: float) -> list[Figure]:
    results: dict[str, Any] = {side: _run(side, size_mb, store_mb, pause_s) for side in (OURS, RAY)}
    setting = (
        f"{size_mb / 1e3:g} GB of uint8 and float64 arrays, made by map_batches, through an object"
        f" store of {store_mb} MB to {CONSUMERS} consumers, numpy batches of {BATCH} rows"
        + (f", each sleeping {1e3 * pause_s:g} ms after a batch" if pause_s else "")
        + "; one run of each side in a cluster of its own"
    )
    samples = {side: [Sample(*s) for s in result["samples"]] for side, result in results.items()}
    figures = []
    for process in ("consumer", "coordinator"):
        raw: dict[str, list[float]] = {}
        for side, taken in samples.items():
            early, late = _early_and_late(taken, f"{process}_mib")
            raw |= {side: [late], f"{side}, early": [early]}
        figures.append(
            Figure(
                f"{name}-{process}",
                f"{setting}: private resident memory of the {process} in the last tenth of the"
                " stream; beside it, early: in the second tenth",
                "MiB",
                "same work",
                raw,
                [
                    Target(RAY, OURS, at_least=NOT_ABOVE),
                    Target(OURS, f"{OURS}, early", at_most=1.05),
                    Target(RAY, f"{RAY}, early"),
                ],
                details={
                    side: {
                        "growth_mib": raw[side][0] - raw[f"{side}, early"][0],
                        "private_peak_mib": max(getattr(s, f"{process}_mib") for s in taken),
                        # With the pages of the object store that the process has touched.
                        "rss_peak_mib": max(getattr(s, f"{process}_rss_mib") for s in taken),
                        "rss_early_and_late_mib": _early_and_late(taken, f"{process}_rss_mib"),
                    }
                    for side, taken in samples.items()
                },
            )
        )
    return [
        *figures,
        Figure(
            f"{name}-store",
            f"{setting}: the most that the object store held",
            "MiB",
            "same work",
            {side: [max(s.store_mib for s in taken)] for side, taken in samples.items()},
            [Target(RAY, OURS, at_least=NOT_ABOVE)],
            details={
                side: {
                    "early_and_late_mib": _early_and_late(taken, "store_mib"),
                    "spilled_files_mib_at_most": results[side]["spilled_mib"],
                }
                for side, taken in samples.items()
            },
        ),
        Figure(
            f"{name}-time",
            f"{setting}: from the first batch to the end",
            "s",
            "same work",
            {side: [taken[-1].at] for side, taken in samples.items()},
        ),
    ]


def _early_and_late(samples: Sequence[Sample], name: str) -> tuple[float, float]:
    """Return medians of the second tenth of the stream, and of the last."""
    end = samples[-1].at
    tenths = [
        [getattr(s, name) for s in samples if start <= s.at / end <= start + 0.1]
        for start in (0.1, 0.9)
    ]
    return statistics.median(tenths[0]), statistics.median(tenths[1])


def _run(side: str, size_mb: int, store_mb: int, pause_s: float) -> Any:
    arguments = [side, *map(str, (size_mb, store_mb, pause_s))]
    command = [sys.executable, "-m", "benchmarks.stream", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = process.communicate()
    finally:
        if process.poll() is None:
            # It has a cluster to stop.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(output.splitlines()[-1])


def _make(batch: dict[str, Any]) -> dict[str, Any]:
    ids = batch["id"]
    image = np.empty((len(ids), BYTES), np.uint8)
    image[:] = (ids % 251)[:, None]
    values = np.empty((len(ids), FLOATS))
    values[:] = ids[:, None]
    return {"image": image, "values": values}


def _sum(batch: dict[str, Any]) -> int:
    """Read a value of each page."""
    return int(batch["image"][:, ::4096].sum()) + int(batch["values"][:, ::512].sum())


def _expected(rows: int) -> int:
    ids = np.arange(rows)
    return int((ids % 251).sum()) * (BYTES // 4096) + int(ids.sum()) * (FLOATS // 512)


async def _drain_async(batches: AsyncIterator[dict[str, Any]], pause_s: float) -> Reading:
    first, rows, checksum = 0.0, 0, 0
    async for batch in batches:
        first = first or perf_counter()
        rows += len(batch["image"])
        checksum += _sum(batch)
        if pause_s:
            await asyncio.sleep(pause_s)
    return Reading(first, perf_counter(), rows, checksum)


def _drain(batches: Iterator[dict[str, Any]], pause_s: float) -> Reading:
    first, rows, checksum = 0.0, 0, 0
    for batch in batches:
        first = first or perf_counter()
        rows += len(batch["image"])
        checksum += _sum(batch)
        if pause_s:
            time.sleep(pause_s)
    return Reading(first, perf_counter(), rows, checksum)


def _one_side(side: str, size_mb: int, store_mb: int, pause_s: float) -> dict[str, Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = ray.init(
        # The benchmark's own cluster runs beside it.
        address="local",
        num_cpus=2,
        object_store_memory=store_mb * MB,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"worker_niceness": 0},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = max(1, size_mb * MB // (ROW_BYTES * BLOCK_ROWS))
    rows = blocks * BLOCK_ROWS
    ds = ray.data.range(rows, override_num_blocks=blocks).map_batches(_make, batch_size=BLOCK_ROWS)
    split = asyncsplit.streaming_split if side == OURS else ray.data.Dataset.streaming_split
    its = list(split(ds, CONSUMERS))
    readers = [ray.remote(Reader).options(num_cpus=0).remote() for _ in its]
    pids = ray.get([reader.pid.remote() for reader in readers])
    coordinator = coordinator_of(its[0])
    spill = Path(context.address_info["session_dir"])
    pending = [
        reader.read.remote(side, it, pause_s) for reader, it in zip(readers, its, strict=True)
    ]
    samples, spilled_mib = [], 0.0
    while not _all_done(pending):
        spilled_mib = max(spilled_mib, _spilled_mib(spill))
        samples.append(_sample(pids, coordinator))
    readings = ray.get(pending)
    work = sum(x.rows for x in readings), sum(x.checksum for x in readings)
    if work != (rows, _expected(rows)):
        raise AssertionError(f"{side} read {work}, not {(rows, _expected(rows))}: rows, checksum")
    first, end = min(x.first for x in readings), max(x.end for x in readings)
    return {
        "samples": [s._replace(at=s.at - first) for s in samples if first <= s.at <= end],
        "spilled_mib": spilled_mib,
    }


def _all_done(pending: Sequence[Any]) -> bool:
    done, _ = ray.wait([*pending], num_returns=len(pending), timeout=EVERY_S, fetch_local=False)
    return len(done) == len(pending)


def _sample(consumers: Sequence[int], coordinator: int) -> Sample:
    read, coordinated = [held(pid) for pid in consumers], held(coordinator)
    name = "object_store_memory"
    free = ray.available_resources().get(name, 0.0)
    return Sample(
        perf_counter(),
        max(x.private_mib for x in read),
        max(x.rss_mib for x in read),
        coordinated.private_mib,
        coordinated.rss_mib,
        (ray.cluster_resources()[name] - free) / 2**20,
    )


def _spilled_mib(session: Path) -> float:
    files = chain.from_iterable(folder.iterdir() for folder in session.glob("ray_spilled_objects*"))
    return sum(_size(file) for file in files) / 2**20


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # restored or dropped meanwhile
        return 0


def main() -> None:
    """Run one side; print its samples as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    parser.add_argument("side", choices=[OURS, RAY])
    parser.add_argument("size_mb", type=int)
    parser.add_argument("store_mb", type=int)
    parser.add_argument("pause_s", type=float)
    try:
        result = _one_side(**vars(parser.parse_args()))
    finally:
        ray.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    # Ray pickles what is defined in __main__ by value, and its workers should import it.
    from benchmarks.stream import main as imported

    imported()
