"""Real work: images in Parquet files, decoded by the dataset and collated by the consumers."""

import asyncio
import importlib.util
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from pyarrow import parquet
from ray.data import Dataset

from benchmarks.harness import (
    ARRIVE_S,
    OURS,
    RAY,
    Bench,
    Figure,
    Target,
    close,
    split,
    wait_for_quiet,
)
from benchmarks.processes import held

SIDE = 224
BATCH = 64
PER_FILE = 120
"""Images in a file, and so in a block: not a multiple of ``BATCH``, so batches cross blocks."""

Collate = Literal["numpy", "torch"]


class Reading(NamedTuple):
    """One consumer's epoch; times are of the machine-wide monotonic clock."""

    start: float
    end: float
    rows: int
    checksum: int
    """Sum of all labels and of every sixth line of pixels."""
    cpu_s: float
    rss_mib: float


Turn = list[Reading]


class Reader:
    """Consumes a split in a process of its own."""

    def __init__(self, ways: list[Collate]) -> None:
        """Import what takes seconds before anything is timed."""
        if "torch" in ways:
            import ray.train.torch  # noqa: F401 - by Ray's own iterator, at the first batch
            import torch

            torch.set_num_threads(1)

    def read(self, side: str, it: Any, start_at: float, collate: Collate) -> Reading:
        """Read one epoch; ours with `async for`, Ray's with `for`."""
        take = _take_torch if collate == "torch" else _take_numpy
        cpu = time.process_time()
        time.sleep(max(0.0, start_at - perf_counter()))
        start = perf_counter()
        if collate == "torch":
            batches = it.iter_torch_batches(batch_size=BATCH)
        else:
            batches = it.iter_batches(batch_size=BATCH, batch_format="numpy")
        rows, checksum = (
            asyncio.run(_drain_async(batches, take)) if side == OURS else _drain(batches, take)
        )
        end = perf_counter()
        cpu = time.process_time() - cpu
        return Reading(start, end, rows, checksum, cpu, held(os.getpid()).rss_mib)


def images(bench: Bench) -> list[Figure]:
    """Parquet files, decoded into images of 224 x 224 x 3 bytes, in batches of 64."""
    ways: list[Collate] = ["numpy", "torch"]
    if missing := [name for name in ("torch", "pydantic") if not importlib.util.find_spec(name)]:
        ways.remove("torch")
        warnings.warn(
            f"images are not collated as tensors: {' and '.join(missing)} not installed,"
            " `pip install 'asyncsplit[torch,train]'`",
            stacklevel=2,
        )
    files = bench.pick(18, 2)
    with _parquet(files) as folder:
        ds = ray.data.read_parquet(folder).map_batches(_decode, batch_size=BATCH)
        readers = [ray.remote(Reader).options(num_cpus=0).remote(ways) for _ in range(2)]
        return [figure for way in ways for figure in _images(bench, ds, files, way, readers)]


def _images(
    bench: Bench, ds: Dataset, files: int, collate: Collate, readers: list[Any]
) -> list[Figure]:
    splits = split(ds, len(readers))
    rounds: dict[str, list[Turn]] = {side: [] for side in splits}
    for _ in range(1 + bench.pick(11, 1)):
        for side, its in splits.items():
            wait_for_quiet(bench.pick(3, 0))
            at = perf_counter() + ARRIVE_S
            rounds[side].append(
                ray.get(
                    [
                        reader.read.remote(side, it, at, collate)
                        for reader, it in zip(readers, its, strict=True)
                    ]
                )
            )
    close(splits)
    work = {
        (sum(x.rows for x in turn), sum(x.checksum for x in turn))
        for turns in rounds.values()
        for turn in turns
    }
    if len(work) != 1 or next(iter(work))[0] != files * PER_FILE:
        raise AssertionError(f"the sides did not do the same work: rows, checksums {work}")

    def values(figure: Callable[[Turn], float]) -> dict[str, list[float]]:
        return {side: [figure(turn) for turn in turns[1:]] for side, turns in rounds.items()}

    setting = (
        f"{files} Parquet files of {PER_FILE} JPEG images, decoded by map_batches into"
        f" {SIDE} x {SIDE} x 3 uint8, batches of {BATCH} as {collate}, 2 consumers that add up"
        " every sixth line of pixels"
    )
    if collate == "torch":
        setting += "; by `iter_torch_batches` on both sides"
    return [
        Figure(
            f"images-{collate}",
            f"{setting}: the whole epoch",
            "ms",
            "same work",
            values(lambda turn: 1e3 * (max(x.end for x in turn) - min(x.start for x in turn))),
            [Target(RAY, OURS, at_least=1)],
            details={
                "largest_consumer_rss_mib": {
                    side: max(x.rss_mib for turn in turns for x in turn)
                    for side, turns in rounds.items()
                }
            },
        ),
        Figure(
            f"images-{collate}-cpu",
            f"{setting}: CPU time of both consumers in an epoch",
            "ms",
            "same work",
            values(lambda turn: 1e3 * sum(x.cpu_s for x in turn)),
            [Target(RAY, OURS, at_least=1)],
        ),
    ]


@contextmanager
def _parquet(files: int) -> Iterator[str]:
    """Write files of pictures that compress as photographs do, the same ones each time."""
    from PIL import Image

    chance = np.random.default_rng(11)
    with tempfile.TemporaryDirectory(prefix="asyncsplit-bench-") as folder:
        for number in range(files):
            pictures = []
            for _ in range(PER_FILE):
                small = Image.fromarray(chance.integers(0, 256, (28, 28, 3), dtype=np.uint8))
                jpeg = io.BytesIO()
                small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(jpeg, "JPEG")
                pictures.append(jpeg.getvalue())
            labels = chance.integers(0, 1_000, PER_FILE)
            parquet.write_table(
                pa.table({"jpeg": pictures, "label": labels}),
                Path(folder) / f"{number:03}.parquet",
            )
        yield folder


def _decode(batch: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in batch["jpeg"]])
    return {"image": pixels, "label": batch["label"]}


# Adding up stands in for the training step. Every sixth line is enough to touch every page.
def _take_numpy(batch: dict[str, Any]) -> tuple[int, int]:
    image = batch["image"]
    return len(image), int(image[:, ::6].sum()) + int(batch["label"].sum())


def _take_torch(batch: dict[str, Any]) -> tuple[int, int]:
    image = batch["image"]
    return len(image), int(image[:, ::6].sum()) + int(batch["label"].sum())


async def _drain_async(batches: Any, take: Callable[[Any], tuple[int, int]]) -> tuple[int, int]:
    rows, total = 0, 0
    async for batch in batches:
        number, checksum = take(batch)
        rows, total = rows + number, total + checksum
    return rows, total


def _drain(batches: Any, take: Callable[[Any], tuple[int, int]]) -> tuple[int, int]:
    rows, total = 0, 0
    for batch in batches:
        number, checksum = take(batch)
        rows, total = rows + number, total + checksum
    return rows, total
