"""The workloads, in order; each returns its figures. Those with code of their own have modules."""

import asyncio
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import ray
from ray import cloudpickle
from ray.data import Dataset

import asyncsplit
from asyncsplit import BatchStream, SplitOptions, engine, plain
from asyncsplit.backlog import GROUP_SLICES
from asyncsplit.consumer import Consumer
from asyncsplit.pipeline import Pipeline
from benchmarks.harness import (
    ARRIVE_S,
    OURS,
    RAY,
    Bench,
    Figure,
    Round,
    Target,
    arrivals,
    close,
    cost,
    split,
    table_blocks,
    values,
)
from benchmarks.images import images
from benchmarks.many import many
from benchmarks.orientation import orientation
from benchmarks.overhead import leases, telemetry
from benchmarks.stream import stream
from benchmarks.worker import Job, Ticks, percentiles, views

AHEAD = "asyncsplit, epochs known"
ON_DEMAND = "asyncsplit, on demand"
KNOWN_ON_DEMAND = "asyncsplit, on demand, epochs known"
BY_HAND = "by hand"
EXECUTOR = "executor alone"
FETCHED = "ray.get and conversion alone"


def batches(bench: Bench) -> list[Figure]:
    """Small numpy batches of a dataset in memory, two consumers."""
    ds = table_blocks(16, 125_000, 4)
    loops = _by_hand(bench, ds, 2, 256)
    kwargs = {"batch_size": 256, "batch_format": "numpy"}
    rounds = bench.compare(
        ds, 2, kwargs, others={BY_HAND: loops}, trace=True, rounds=bench.pick(15, 3)
    )
    setting = "2 M rows of 4 float64 in 16 blocks, numpy batches of 256 rows, 2 consumers"
    gaps = {
        side: percentiles(
            [1e6 * gap for turn in rounds[f"{side} traced"] for x in turn.loops for gap in x.gaps]
        )
        for side in (OURS, RAY)
    }
    epochs = values(rounds, lambda turn: turn.epoch_ms)
    del epochs[BY_HAND]
    return [
        Figure(
            "batch",
            f"{setting}: time from first batch to end, divided by batches",
            "us",
            "same work",
            values(rounds, lambda turn: turn.per_batch_us),
            [Target(RAY, OURS, at_least=40), Target(OURS, BY_HAND, at_most=2.5)],
            details={"gaps_between_batches_us": gaps, "cost": cost(rounds)},
        ),
        Figure(
            "epoch",
            f"{setting}: the whole epoch, its start included",
            "ms",
            "same work",
            epochs,
            [Target(RAY, OURS, at_least=15)],
        ),
    ]


def formats(bench: Bench) -> list[Figure]:
    """Other formats, batch sizes, and `for` in place of `async for`."""
    figures = []
    for name, batch_format, size, rows, drive in (
        ("pandas", "pandas", 256, 400_000, "async for"),
        ("pyarrow", "pyarrow", 256, 800_000, "async for"),
        ("batch-size-1", "numpy", 1, 32_000, "async for"),
        ("batch-size-32", "numpy", 32, 512_000, "async for"),
        ("batch-size-4096", "numpy", 4096, 8_000_000, "async for"),
        ("for", "numpy", 256, 2_000_000, "for"),
        ("data-iterator", "numpy", 256, 2_000_000, "as_data_iterator"),
    ):
        blocks = 16
        if bench.quick:
            if name in ("pyarrow", "batch-size-32", "batch-size-4096", "for"):
                continue
            rows //= 8
        ds = table_blocks(blocks, rows // blocks, 4)
        kwargs = {"batch_size": size, "batch_format": batch_format}
        rounds = bench.compare(
            ds,
            2,
            kwargs,
            drive=drive,  # type: ignore[arg-type]
            rounds=bench.pick(5, 3),
        )
        figures.append(
            Figure(
                name,
                f"{rows} rows of 4 float64 in 16 blocks, {batch_format} batches of {size} rows,"
                f" 2 consumers, `{drive}`: time from first batch to end, divided by batches",
                "us",
                "same work",
                values(rounds, lambda turn: turn.per_batch_us),
                [Target(RAY, OURS, at_least=3)],
                details={
                    "epoch_ms": values(rounds, lambda turn: turn.epoch_ms),
                    "cost": cost(rounds),
                },
            )
        )
    return figures


def blocks(bench: Bench) -> list[Figure]:
    """Many small blocks, handed out whole, one consumer."""
    number = bench.pick(2_000, 500)
    ds = table_blocks(number, 100, 4)
    setting = f"{number} blocks of 100 rows of 4 float64, whole blocks, 1 consumer: the whole epoch"
    figures = [_blocks(bench, "blocks", setting, ds, Target(RAY, OURS, at_least=10))]
    if not bench.quick:
        # asyncsplit executes nothing for blocks that the dataset holds; a limit it has to.
        limited, setting = ds.limit(ds.count()), f"the same behind a limit: {setting}"
        figures.append(_blocks(bench, "blocks-executed", setting, limited, Target(RAY, OURS)))
    return figures


def _blocks(bench: Bench, name: str, setting: str, ds: Dataset, beside_ray: Target) -> Figure:
    rounds = bench.compare(
        ds,
        1,
        {"batch_size": None, "batch_format": "numpy"},
        others={EXECUTOR: _executor_alone(bench, ds), FETCHED: _fetch_alone(bench, ds)},
    )
    return Figure(
        name,
        setting,
        "ms",
        "same work",
        values(rounds, lambda turn: turn.epoch_ms),
        [beside_ray, Target(OURS, EXECUTOR, at_most=1.5), Target(OURS, FETCHED)],
        details={"cost": cost(rounds)},
    )


def turnaround(bench: Bench) -> list[Figure]:
    """From the last consumer's arrival to the moment when all have their first batch."""
    return [_turnaround(bench, n) for n in ((2,) if bench.quick else (2, 8))]


def _turnaround(bench: Bench, n: int) -> Figure:
    epochs = bench.pick(6, 3)
    ds = table_blocks(4 * n, 256, 4)
    turns_each = bench.pick(3, 1)
    known = SplitOptions(epochs=epochs * turns_each)
    splits = {**split(ds, n), AHEAD: asyncsplit.streaming_split(ds, n, options=known)}
    job = Job({"batch_size": 256, "batch_format": "numpy"})
    starts = arrivals(n, epochs, spacing_s=0.8, jitter_s=0.2)

    def run(side: str) -> Round:
        return bench.consume(side.split(",")[0], splits[side], job, arrivals=starts)

    rounds = bench.take_turns(
        {side: lambda side=side: run(side) for side in splits},  # type: ignore[misc]
        turns_each,
        rows=len(starts[0]) * 4 * n * 256,
    )
    raw = {
        side: [wait for turn in turns for wait in _waits(turn, epochs)]
        for side, turns in rounds.items()
    }
    alone = bench.take_turns({EXECUTOR: _executor_alone(bench, ds)}, 1 + epochs)
    raw[EXECUTOR] = [
        1e3 * (loop.first - loop.start) for turn in alone[EXECUTOR][1:] for loop in turn.loops
    ]
    (worker,) = bench.workers(1)
    calls = ray.get(worker.call.remote(splits[OURS][0], bench.pick(200, 50)))
    raw["one call"] = [1e3 * took_s for took_s in calls]
    close(splits)
    return Figure(
        f"turnaround-{n}",
        f"{n} consumers, {4 * n} blocks, arriving at the same random times within 0.2 s: from the"
        " last arrival until all consumers have their first batch; epochs after the first. Beside"
        " it: Ray Data's executor alone, from its start to its first block; one call of the"
        " coordinator by one consumer, while nobody reads",
        "ms",
        "same work",
        raw,
        [Target(RAY, OURS, at_least=4), Target(RAY, AHEAD, at_least=20)],
        limits={AHEAD: 5.0},
    )


def _waits(turn: Round, epochs: int) -> list[float]:
    waits = []
    for epoch in range(1, epochs):
        loops = [report.loops[epoch] for report in turn.reports]
        last_arrival = max(loop.start for loop in loops)
        waits.append(1e3 * (max(loop.first for loop in loops if loop.batches) - last_arrival))
    return waits


def sizes(bench: Bench) -> list[Figure]:
    """How many bytes it takes to send an iterator to a worker."""
    raw: dict[str, list[float]] = {OURS: [], RAY: [], "dataset": []}
    numbers = (10, 300) if bench.quick else (10, 1_000, 20_000)
    for number in numbers:
        ds = table_blocks(number, 1, 4)
        splits = split(ds, 1)
        for side, (it,) in splits.items():
            raw[side].append(float(len(cloudpickle.dumps(it))))
        raw["dataset"].append(float(len(cloudpickle.dumps(ds))))
        close(splits)
    return [
        Figure(
            "size",
            f"the pickled iterator, for datasets of {', '.join(map(str, numbers))} blocks, beside"
            " the pickled dataset; not timed: one value per dataset",
            "bytes",
            "same work",
            raw,
            limits={OURS: 4096.0},
            details={"constant": len(set(raw[OURS])) == 1},
        )
    ]


def shuffle(bench: Bench) -> list[Figure]:
    """A local shuffle buffer."""
    rows = bench.pick(1_000_000, 200_000)
    ds = table_blocks(16, rows // 16, 4)
    kwargs = {
        "batch_size": 256,
        "batch_format": "numpy",
        "local_shuffle_buffer_size": 10_000,
        "local_shuffle_seed": 1,
    }
    rounds = bench.compare(ds, 2, kwargs)
    return [
        Figure(
            "shuffle",
            f"{rows} rows of 4 float64 in 16 blocks, numpy batches of 256 rows out of a shuffle"
            " buffer of 10,000 rows, 2 consumers: the whole epoch",
            "ms",
            "same work",
            values(rounds, lambda turn: turn.epoch_ms),
            [Target(RAY, OURS, at_least=5)],
            details={
                "per_batch_us": values(rounds, lambda turn: turn.per_batch_us),
                "cost": cost(rounds),
            },
        )
    ]


def wide(bench: Bench) -> list[Figure]:
    """A thousand columns in many small blocks."""
    number = bench.pick(1_000, 20)
    ds = table_blocks(number, 10, 1_000)
    rounds = bench.compare(
        ds,
        1,
        {"batch_size": None, "batch_format": "numpy"},
        others={FETCHED: _fetch_alone(bench, ds)},
        rounds=bench.pick(5, 3),
    )
    return [
        Figure(
            "wide",
            f"{number} blocks of 10 rows of 1,000 float64, whole blocks as numpy, 1 consumer:"
            " the whole epoch",
            "ms",
            "same work",
            values(rounds, lambda turn: turn.epoch_ms),
            [Target(RAY, OURS, at_least=5), Target(OURS, FETCHED)],
            details={"cost": cost(rounds)},
        )
    ]


def straggler(bench: Bench) -> list[Figure]:
    """Four consumers, one of them ten times slower."""
    number, fast_s, slow_s = bench.pick(240, 80), 0.005, 0.05
    ds = table_blocks(number, 256, 4)
    nominal = 1e3 * _ideal_s(number, [slow_s] + [fast_s] * 3)
    turns_each = bench.pick(7, 2)
    demand = SplitOptions(routing="demand")
    iterators: dict[str, Sequence[Any]] = {
        **split(ds, 4),
        ON_DEMAND: asyncsplit.streaming_split(ds, 4, options=demand),
        KNOWN_ON_DEMAND: asyncsplit.streaming_split(
            ds, 4, options=replace(demand, epochs=1 + turns_each)
        ),
    }
    kwargs = {"batch_size": 256, "batch_format": "numpy"}

    def run(side: str) -> Round:
        start = [perf_counter() + ARRIVE_S]
        reports = [
            worker.iterate.remote(
                side.split(",")[0], [it], start, Job(kwargs, pause_s=fast_s if i else slow_s)
            )
            for i, (worker, it) in enumerate(zip(bench.workers(4), iterators[side], strict=True))
        ]
        return Round(ray.get(reports))

    turns: dict[str, Callable[[], Round]] = {
        side: lambda side=side: run(side)  # type: ignore[misc]
        for side in iterators
    }
    bench.take_turns(turns, 1, rows=number * 256)
    rounds = bench.take_turns(turns, turns_each, rows=number * 256)
    raw = values(rounds, lambda turn: turn.epoch_ms)
    pauses = [
        [loop.paused_s / loop.batches for loop in turn.loops if loop.batches]
        for turn in rounds[ON_DEMAND]
    ]
    raw["ideal schedule"] = [1e3 * _ideal_s(number, each) for each in pauses]
    raw["ideal schedule, exact pauses"] = [nominal] * len(raw[RAY])
    close(iterators)
    return [
        Figure(
            "straggler",
            f"{number} blocks of one batch each, 4 consumers, three sleeping 5 ms and one 50 ms"
            " after each batch, equal=False: the whole epoch. The ideal schedule has neither a"
            " start nor messages; its pauses are each consumer's mean ones in the same turn on"
            " demand, because a sleep takes longer than it should; beside it, with exact pauses",
            "ms",
            "only one side has it",
            raw,
            [
                Target(ON_DEMAND, "ideal schedule", at_most=1.15),
                Target(KNOWN_ON_DEMAND, "ideal schedule"),
                Target(ON_DEMAND, "ideal schedule, exact pauses"),
                Target(RAY, ON_DEMAND),
                Target(RAY, OURS),
            ],
            details={
                "batches_of_the_slow_consumer": {
                    side: [turn.reports[0].loops[0].batches for turn in turns]
                    for side, turns in rounds.items()
                },
                "mean_pauses_ms": [[1e3 * pause_s for pause_s in each] for each in pauses],
            },
        )
    ]


def _ideal_s(number: int, pauses: Sequence[float]) -> float:
    """Return when the last of so many batches is done if each goes to whoever is done first."""
    free = [(pause, pause) for pause in pauses]
    done = 0.0
    for _ in range(number):
        at, pause = heapq.heappop(free)
        done = max(done, at)
        heapq.heappush(free, (at + pause, pause))
    return done


def loop(bench: Bench) -> list[Figure]:
    """How late other tasks are woken in the event loop that iterates."""
    settings: dict[str, tuple[Dataset, dict[str, Any], int]] = {
        "batches": (
            table_blocks(16, bench.pick(125_000, 25_000), 4),
            {"batch_size": 256, "batch_format": "numpy"},
            bench.pick(20, 8),
        ),
        "blocks": (
            table_blocks(2_000, 100, 4),
            {"batch_size": None, "batch_format": "numpy"},
            bench.pick(4, 2),
        ),
    }
    names = ["batches"] if bench.quick else [*settings]
    return [_loop(bench, name, *settings[name]) for name in names]


def _loop(bench: Bench, name: str, ds: Dataset, kwargs: dict[str, Any], epochs: int) -> Figure:
    splits = split(ds, 1)
    (worker,) = bench.workers(1)
    # Ray's way through a thread takes so long per batch that one epoch has to do.
    ways = {
        OURS: ("async for", OURS, epochs),
        RAY: ("for, and sleep(0) after each batch", RAY, 1),
        "ray, to_thread(next)": ("to_thread(next)", RAY, 1),
        "ticker alone": ("ticker alone", OURS, 1),
    }
    ticks: dict[str, list[Ticks]] = {side: [] for side in ways}
    for _ in range(bench.pick(5, 2)):
        for side, (how, whose, times) in ways.items():
            ticks[side].append(
                ray.get(worker.tick.remote(how, splits[whose][0], kwargs, times, 0.001))
            )
    close(splits)
    read = {each.batches // ways[side][2] for side, turns in ticks.items() for each in turns} - {0}
    if len(read) != 1:
        raise AssertionError(f"the sides read different numbers of batches per epoch: {read}")
    delays = {
        side: percentiles([1e3 * delay for each in turns for delay in each.delays])
        for side, turns in ticks.items()
        if sum(len(each.delays) for each in turns) > 1
    }
    return Figure(
        f"loop-{name}",
        f"a task that sleeps 1 ms again and again beside the loop of workload `{name}` with 1"
        " consumer: the 99th percentile of how late it is woken",
        "ms",
        "same work",
        {
            side: [percentiles([1e3 * d for d in each.delays])["p99"] for each in turns]
            for side, turns in ticks.items()
        },
        limits={OURS: 5.0},
        details={
            "delays_ms": delays,
            "largest_delay_under_20_ms": delays[OURS]["max"] < 20,
            "batches_per_s": {
                side: [each.batches / each.seconds for each in turns]
                for side, turns in ticks.items()
            },
        },
    )


def way(bench: Bench) -> list[Figure]:
    """What the single steps of a block's and a batch's way cost, one after the other."""
    number, rows = 640, 125_000
    small = table_blocks(number, 100, 4)
    refs = _refs(small)
    (large,) = ray.get(_refs(table_blocks(1, rows, 4)))
    per_block: dict[str, list[float]] = {
        "fetch": [],
        "arrays of the pickle": [],
        "unpickle": [],
        "to numpy": [],
    }
    per_batch: dict[str, list[float]] = {"pipeline": [], "stream": [], BY_HAND: []}
    arrays = {name: large[name].to_numpy() for name in large.column_names}
    for _ in range(bench.pick(40, 10)):
        times = [perf_counter()]
        packed = [
            each
            for start in range(0, number, GROUP_SLICES)
            for each in engine.get_packed(refs[start : start + GROUP_SLICES]) or ()
        ]
        times.append(perf_counter())
        pickled = [each for each in map(engine.pickled, packed) if each is not None]
        blocks = [block for block in map(plain.read, pickled) if block is not None]
        if len(blocks) != number:
            raise AssertionError(f"{number - len(blocks)} blocks are not plain")
        _exhaust(_pipeline(blocks, None).batches)
        times.append(perf_counter())
        fetched = [engine.unpack(each) for each in packed]
        times.append(perf_counter())
        _exhaust(_pipeline(fetched, None).batches)
        times.append(perf_counter())
        del packed, blocks, fetched
        for step, (begin, end) in zip(per_block, pairwise(times), strict=True):
            per_block[step].append(1e6 * (end - begin) / number)
        for step, took_s in {
            "pipeline": _exhaust(_pipeline([large], 256).batches),
            "stream": asyncio.run(_exhaust_stream(_pipeline([large], 256))),
            BY_HAND: _exhaust(views([arrays], 256)),
        }.items():
            per_batch[step].append(1e6 * took_s / (rows / 256))
    return [
        Figure(
            "way-block",
            "steps in the consumer for one of many blocks of 100 rows of 4 float64, handed out"
            " whole as numpy: fetching it if it is here, making its arrays of Ray's pickle;"
            " or else, if it is not plain, unpickling and converting it",
            "us",
            "only one side has it",
            per_block,
        ),
        Figure(
            "way-batch",
            "steps for one numpy batch of 256 rows of 4 float64: the pipeline alone, the pipeline"
            " within `async for` over a stream that is never out of blocks, and cut by hand",
            "us",
            "only one side has it",
            per_batch,
        ),
    ]


def _pipeline(blocks: Sequence[Any], batch_size: int | None) -> Pipeline:
    pipeline = Pipeline(batch_size=batch_size, batch_format="numpy")
    for block in blocks:
        pipeline.add(block, 0, len(block))
    pipeline.finish()
    return pipeline


def _exhaust(batches: Iterable[Any]) -> float:
    began = perf_counter()
    for _ in batches:
        pass
    return perf_counter() - began


async def _exhaust_stream(pipeline: Pipeline) -> float:
    stream: BatchStream[Any] = BatchStream(
        Consumer(None, 0, 0),  # type: ignore[arg-type]
        lambda: pipeline,
        prefetch_batches=1,
        batch_size=256,
    )
    began = perf_counter()
    async for _ in stream:
        pass
    return perf_counter() - began


def _by_hand(bench: Bench, ds: Dataset, n: int, size: int) -> Callable[[], Round]:
    """Let n workers keep the dataset's blocks among them; return a turn over those."""
    workers = bench.workers(n)
    refs = _refs(ds)
    ray.get([worker.keep.remote(refs[i::n]) for i, worker in enumerate(workers)])

    def run() -> Round:
        start = perf_counter() + ARRIVE_S
        return Round(
            ray.get([worker.iterate_by_hand.remote(start, size, False) for worker in workers])
        )

    return run


def _refs(ds: Dataset) -> list[Any]:
    return [entry.ref for bundle in ds.iter_internal_ref_bundles() for entry in bundle.blocks]


def _fetch_alone(bench: Bench, ds: Dataset) -> Callable[[], Round]:
    (worker,) = bench.workers(1)
    refs = _refs(ds)

    def run() -> Round:
        return Round([ray.get(worker.fetch_alone.remote(refs, perf_counter() + ARRIVE_S))])

    run()  # who asks for the first time asks the blocks' owner where they are
    return run


def _executor_alone(bench: Bench, ds: Dataset) -> Callable[[], Round]:
    (worker,) = bench.workers(1)

    def run() -> Round:
        return Round([ray.get(worker.execute_alone.remote(ds, perf_counter() + ARRIVE_S))])

    return run


ALL = {
    workload.__name__: workload
    for workload in (
        batches,
        formats,
        blocks,
        turnaround,
        shuffle,
        wide,
        sizes,
        straggler,
        loop,
        telemetry,
        leases,
        many,
        way,
        images,
        stream,
        orientation,
    )
}
