"""Stop in the middle of an epoch, save where every split is, and go on with other workers.

    python examples/resume.py state.json --workers 2 --stop-after 3
    python examples/resume.py state.json --workers 3

Ctrl-C saves, too.
"""

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

import ray

import asyncsplit

State = dict[str, Any]


async def train(
    split: asyncsplit.AsyncDataIterator, epochs: int, stop_after: int | None, states: list[State]
) -> int:
    """Train to the end of the last epoch, or until so many batches are done; return the rows."""
    rows, batches, epoch = 0, 0, -1
    while epoch < epochs - 1:
        async with split.iter_batches(batch_size=100) as stream:
            try:
                async for batch in stream:
                    # Look before the step: a batch in hand is not finished, and comes again.
                    if batches == stop_after:
                        return rows
                    rows += len(batch["id"])  # your training step
                    batches += 1
            finally:
                # While the stream is open: once it is closed, the split is at the next epoch.
                states[split.split_index] = split.state_dict()
        epoch = stream.statistics().epoch or 0
    return rows


def save(path: Path, states: list[State]) -> None:
    """Write all splits' states, or leave the file as it was: half of it would be of no use."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(states))
    os.replace(new, path)


async def main() -> None:
    """Train on one event loop, a task for each split; with actors, collect their states."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--stop-after", type=int, help="batches of each worker")
    parser.add_argument("--rows", type=int, default=6_000)
    args = parser.parse_args()

    dataset = ray.data.range(args.rows)
    dataset.context.execution_options.preserve_order = True  # or no position could be found again
    splits = asyncsplit.streaming_split(dataset, args.workers)
    if args.state.exists():
        saved = json.loads(args.state.read_text())
        for split in splits:
            split.load_state_dict(saved)

    states = [split.state_dict() for split in splits]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(train(split, args.epochs, args.stop_after, states))
                for split in splits
            ]
        print("rows:", sum(task.result() for task in tasks))
    finally:
        save(args.state, states)


if __name__ == "__main__":
    asyncio.run(main())
