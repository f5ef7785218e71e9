"""The job: async workers train one logistic regression, each on its split of a dataset.

It predicts at take-off whether a flight will arrive late. Each worker computes a gradient on its
own batch, all workers average their gradients, and so all of them keep the same weights.
"""

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray

import asyncsplit
from asyncsplit.demo.flights import Encoding, Flights, encode
from asyncsplit.demo.observed import Answer, Observed
from asyncsplit.demo.record import Epoch, EpochReport, Progress
from asyncsplit.demo.settle import settled
from asyncsplit.telemetry.scrape import Samples

LEARNING_RATE = 0.2
BLOCKS = 16
"""Blocks of the dataset: the first are trained on while the others are still being made."""
TICK_S = 0.2
"""How often the workers are asked how far they are."""

Vector = npt.NDArray[np.float64]


class Plan(NamedTuple):
    """What the user may set."""

    workers: int
    epochs: int
    batch_size: int


class Outcome(NamedTuple):
    """What happened."""

    workers: list[list[EpochReport]]
    """For each worker, its epochs."""
    metrics: Samples
    """What the coordinator's endpoint served at the end."""
    answers: list[Answer]
    """What Prometheus says, if one looked on."""


class Worker:
    """One training process; its event loop answers questions while it trains."""

    def __init__(self, split: asyncsplit.AsyncDataIterator, all_reduce: Any, width: int) -> None:
        """Begin with weights of 0 for ``width`` features."""
        self._split = split
        self._all_reduce = all_reduce
        self._weights = np.zeros(width)
        self._epochs: list[Epoch] = []
        self._training = asyncio.Event()

    async def train(self, epochs: int, batch_size: int) -> list[EpochReport]:
        """Train; return what each epoch brought."""
        for _ in range(epochs):
            stream = self._split.iter_batches(batch_size=batch_size)
            self._epochs.append(epoch := Epoch(stream))
            async for batch in stream:
                own = gradient_and_loss(self._weights, batch["features"], batch["late"])
                mean = await self._all_reduce.mean.remote(own)
                self._weights -= LEARNING_RATE * mean[:-1]
                epoch.note(batch["row_id"], loss=float(mean[-1]))
                self._training.set()
            epoch.end()
        return [epoch.report() for epoch in self._epochs]

    async def ask_for_schema(self) -> None:
        """Ask for the dataset's schema at a bad moment, then in the ways that always work."""
        await self._training.wait()
        try:
            await self._split.schema()
        except asyncsplit.ExecutionActiveError:
            await self._split.schema(during_execution="observed")
        await self._split.schema(during_execution="wait")

    async def progress(self) -> Progress:
        """Return how far training has come."""
        return Progress.of(self._epochs)


class AllReduce:
    """Gives every worker the mean of what all workers bring to a step."""

    def __init__(self, workers: int) -> None:
        """Expect so many workers at every step."""
        self._workers = workers
        self._step = _Step()

    async def mean(self, vector: Vector) -> Vector:
        """Return the mean of a step's vectors as soon as all workers have brought theirs."""
        step = self._step
        step.vectors.append(vector)
        if len(step.vectors) == self._workers:
            self._step = _Step()
            step.complete.set()
        await step.complete.wait()
        mean: Vector = np.mean(step.vectors, axis=0)
        return mean


@dataclass
class _Step:
    vectors: list[Vector] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)


def gradient_and_loss(
    weights: Vector, features: npt.NDArray[np.float32], late: npt.NDArray[np.float32]
) -> Vector:
    """Return the gradient of a batch's mean log loss and, as last element, that loss."""
    logits = features @ weights
    loss = np.mean(np.logaddexp(0, logits) - late * logits)
    error = 1 / (1 + np.exp(-logits)) - late
    return np.append(features.T @ error / len(late), loss).astype(np.float64)


async def run(
    flights: Flights,
    plan: Plan,
    say: Callable[[str], None],
    show: Callable[[Sequence[Progress]], None],
    observed: Observed | None = None,
) -> Outcome:
    """Train on some flights, on a Ray that is running.

    Args:
        flights: What to train on.
        plan: How.
        say: Called with what the user should know.
        show: Called a few times a second with the progress of all workers.
        observed: A Prometheus that looks on.
    """
    encoding = Encoding.of(flights.table)
    dataset = ray.data.from_arrow(flights.table, override_num_blocks=BLOCKS).map_batches(
        encode,  # type: ignore[arg-type]  # Ray's annotation knows of no fn_kwargs
        fn_kwargs={"encoding": encoding},
        batch_size=None,
    )
    dataset.set_name("flights")
    splits = asyncsplit.streaming_split(dataset, plan.workers, equal=True)
    url = await splits[0].metrics_url()
    if url is None:
        raise OSError("the coordinator could not open a port for its metrics")
    say(f"metrics at {url} while this runs; to watch, in another terminal:")
    say(f"{sys.executable} -m asyncsplit top")
    if observed is not None:
        await observed.begin(url, plan.workers)
        say(f"Prometheus at {observed.url} scrapes them once a second")
    say(f"starting {plan.workers} workers")

    # No CPUs for those who mostly wait: the two there are belong to the dataset's tasks.
    all_reduce = ray.remote(AllReduce).options(num_cpus=0).remote(plan.workers)
    make_worker: Callable[..., Any] = ray.remote(Worker).options(num_cpus=0).remote
    workers = [make_worker(split, all_reduce, encoding.width) for split in splits]
    training: list[asyncio.Future[list[EpochReport]]] = [
        asyncio.ensure_future(worker.train.remote(plan.epochs, plan.batch_size))
        for worker in workers
    ]
    asking = [asyncio.ensure_future(worker.ask_for_schema.remote()) for worker in workers]
    unfinished = {*training, *asking}
    while unfinished:
        done, unfinished = await asyncio.wait(
            unfinished, timeout=TICK_S, return_when=asyncio.FIRST_EXCEPTION
        )
        await asyncio.gather(*done)  # raises what one of them raised
        show(await asyncio.gather(*(worker.progress.remote() for worker in workers)))
    metrics = await settled(url, plan.epochs)
    answers = [] if observed is None else await observed.end()
    return Outcome([task.result() for task in training], metrics, answers)
