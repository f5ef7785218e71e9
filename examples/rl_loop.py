"""Asynchronous reinforcement learning: actors roll out prompts, a learner trains on the results.

Whoever is free gets the next prompts, so a long rollout holds nobody up. The queue is bounded: when
the learner is behind, actors wait, and so does the dataset.
"""

import argparse
import asyncio
import random
from typing import Any

import ray

import asyncsplit


@ray.remote(num_cpus=0)
class Learner:
    """Takes trajectories from a queue and trains on them."""

    def __init__(self, queue_size: int) -> None:
        """Begin with an empty queue."""
        self.queue: asyncio.Queue[list[dict[str, Any]]] = asyncio.Queue(queue_size)
        self.version = 0

    async def put(self, trajectories: list[dict[str, Any]]) -> int:
        """Return the version of the weights to go on with, as soon as there is room."""
        await self.queue.put(trajectories)
        return self.version

    async def learn(self, prompts: int, timeout_s: float) -> str:
        """Train until all prompts are through; whatever does not come in time is an error."""
        seen = stale = 0
        while seen < prompts:
            async with asyncio.timeout(timeout_s):
                trajectories = await self.queue.get()
            seen += len(trajectories)
            stale += sum(self.version - each["version"] for each in trajectories)
            await asyncio.sleep(0)  # your optimiser step
            self.version += 1
        return f"{seen} trajectories, {self.version} versions, {stale / seen:.1f} behind on average"


@ray.remote(num_cpus=0)
class Actor:
    """Rolls out the prompts of its split."""

    def __init__(self, split: asyncsplit.AsyncDataIterator, learner: Any) -> None:
        """Begin with the first version of the weights."""
        self.split = split
        self.learner = learner
        self.version = 0

    async def run(self) -> int:
        """Roll out all prompts of an epoch that this actor can get; return how many that were."""
        prompts = 0
        async with self.split.iter_batches(batch_size=8) as stream:
            async for batch in stream:
                trajectories = await asyncio.gather(*map(self.roll_out, batch["id"].tolist()))
                # A batch counts as finished when the next one is asked for: that is, when the
                # learner has it.
                self.version = await self.learner.put.remote(trajectories)
                prompts += len(trajectories)
        return prompts

    async def roll_out(self, prompt: int) -> dict[str, Any]:
        """Play one episode."""
        await asyncio.sleep(random.uniform(0, 0.02))  # your environment, or a model's server
        return {"prompt": prompt, "reward": random.random(), "version": self.version}


async def main() -> None:
    """Run two actors and a learner. Ctrl-C ends this process, and Ray everything it started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2_000)
    args = parser.parse_args()

    dataset = ray.data.range(args.prompts, override_num_blocks=max(2, args.prompts // 50))
    options = asyncsplit.SplitOptions(routing="demand", rejoin_timeout_s=60)
    splits = asyncsplit.streaming_split(dataset, 2, options=options)
    learner = Learner.remote(queue_size=4)
    actors = [Actor.remote(split, learner) for split in splits]
    # If anything fails, nothing goes on: the group ends with the first error.
    async with asyncio.TaskGroup() as group:
        learning = group.create_task(until(learner.learn.remote(args.prompts, timeout_s=60)))
        acting = [group.create_task(until(actor.run.remote())) for actor in actors]
    print("prompts:", sum(task.result() for task in acting))
    print("learnt:", learning.result())


async def until(ref: Any) -> Any:
    """Await a Ray call as a coroutine, which is what a task needs."""
    return await ref


if __name__ == "__main__":
    asyncio.run(main())
