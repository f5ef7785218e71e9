"""Two datasets on one event loop: each epoch's weights are validated while the next one trains.

Both are split among the same two workers. Each has its own epochs, its own coordinator and metrics.
"""

import argparse
import asyncio

import numpy as np
import ray

import asyncsplit


@ray.remote(num_cpus=0)
class Worker:
    """Fits y = 3 x with one weight."""

    def __init__(
        self, train: asyncsplit.AsyncDataIterator, validation: asyncsplit.AsyncDataIterator
    ) -> None:
        """Begin with a weight of 0."""
        self.train = train
        self.validation = validation
        self.weight = 0.0

    async def run(self, epochs: int) -> list[float]:
        """Return the validation's loss of each epoch."""
        validations: list[asyncio.Task[float]] = []
        # An error on either side cancels the other, and its stream lets go of its split.
        async with asyncio.TaskGroup() as group:
            for _ in range(epochs):
                await self.train_epoch()
                if validations:
                    await validations[-1]  # one validation at a time reads the split
                validations.append(group.create_task(self.validate(self.weight)))
        return [validation.result() for validation in validations]

    async def train_epoch(self) -> None:
        """Take a step for each batch."""
        async with self.train.iter_batches(batch_size=256) as stream:
            async for batch in stream:
                x = batch["x"]
                self.weight -= 0.05 * float(np.mean((self.weight * x - 3 * x) * x))

    async def validate(self, weight: float) -> float:
        """Return the mean loss of a weight."""
        async with self.validation.iter_batches(batch_size=256) as stream:
            losses = [np.mean((weight - 3) ** 2 * batch["x"] ** 2) async for batch in stream]
        return float(np.mean(losses))


def numbers(rows: int) -> ray.data.Dataset:
    """Return a dataset of random numbers."""

    def draw(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        random = np.random.default_rng(batch["id"])
        return {"x": random.normal(size=len(batch["id"]))}

    return ray.data.range(rows).map_batches(draw)


async def main() -> None:
    """Run two workers. Ctrl-C ends this process, and Ray everything that it started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()

    # Told how many epochs there are, each dataset starts on the next one before it is asked for.
    options = asyncsplit.SplitOptions(epochs=args.epochs)
    train, validation = numbers(args.rows), numbers(args.rows // 10)
    train.set_name("train")  # their names in the metrics
    validation.set_name("validation")
    workers = [
        Worker.remote(*pair)
        for pair in zip(
            asyncsplit.streaming_split(train, 2, equal=True, options=options),
            asyncsplit.streaming_split(validation, 2, equal=True, options=options),
            strict=True,
        )
    ]
    for losses in await asyncio.gather(*(worker.run.remote(args.epochs) for worker in workers)):
        print("validated:", len(losses), "epochs, better:", losses[-1] < losses[0])


if __name__ == "__main__":
    asyncio.run(main())
