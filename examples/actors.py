"""Train in plain Ray actors; one that dies is restarted and goes on where it was.

``python examples/actors.py --crash`` ends a worker's process in the middle of an epoch.
"""

import argparse
import asyncio
import os

import ray

import asyncsplit


# num_cpus=0 leaves the CPUs to the dataset. Ray restarts a dead actor and calls train() again.
@ray.remote(num_cpus=0, max_restarts=2, max_task_retries=2)
class Worker:
    """Trains on one split."""

    def __init__(self, split: asyncsplit.AsyncDataIterator, crash: bool) -> None:
        """Begin anew, also after a restart: load your checkpoint here."""
        self.split = split
        self.crash = crash and not ray.get_runtime_context().was_current_actor_reconstructed

    async def train(self, epochs: int) -> int:
        """Train to the end of the last epoch; return the rows this process has seen."""
        rows, epoch = 0, -1
        # Ask the stream for the epoch and do not count: a restarted worker begins in the middle.
        while epoch < epochs - 1:
            async with self.split.iter_batches(batch_size=100) as stream:
                async for batch in stream:
                    rows += len(batch["id"])  # your training step, with await where it waits
                    if self.crash and rows >= 500:
                        os._exit(1)
            epoch = stream.statistics().epoch or 0
        return rows


async def main() -> None:
    """Run two workers. Ctrl-C ends this process, and Ray everything that it started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--crash", action="store_true")
    args = parser.parse_args()

    # A worker that stays away is an error for the other after this time, not a hang.
    options = asyncsplit.SplitOptions(barrier_timeout_s=300, rejoin_timeout_s=60)
    dataset = ray.data.range(args.rows)
    splits = asyncsplit.streaming_split(dataset, 2, equal=True, options=options)
    workers = [Worker.remote(split, args.crash and i == 1) for i, split in enumerate(splits)]
    print("rows:", await asyncio.gather(*(worker.train.remote(args.epochs) for worker in workers)))


if __name__ == "__main__":
    asyncio.run(main())
