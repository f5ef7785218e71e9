"""``python -m dashboards.job DIR`` runs the job that the previews show, for a minute and a half.

Four workers train for three epochs, with equal shares. The one of split 2 is slow. The schema is
asked for when an epoch has begun, and in the middle of it the dataset stops for a while. In the
second epoch the worker of split 1 is killed and replaced, and it comes late to the third. The
coordinator announces itself in DIR, for a Prometheus that scrapes once a second: see
`dashboards.preview`.
"""

import asyncio
import contextlib
import sys
import time
from typing import Any

import ray

import asyncsplit

SPLITS, EPOCHS = 4, 3
ROWS = 120_003
"""Some of which have to be left out, for equal shares."""
STEP_S, SLOW_STEP_S = 0.03, 0.06
PAUSE_S = 6.0


class Worker:
    """Trains on one split."""

    def __init__(self, split: asyncsplit.AsyncDataIterator) -> None:
        """Begin."""
        self._split = split
        self._step_s = SLOW_STEP_S if split.split_index == 2 else STEP_S

    async def train(self) -> None:
        """Train for an epoch."""
        async for _ in self._split.iter_batches(batch_size=100):
            await asyncio.sleep(self._step_s)


def slow_in_the_middle(batch: Any) -> Any:
    """Take a while for each block, and for two of them, one for each CPU, long."""
    time.sleep(0.4)
    if {60_000, 62_500} & set(batch["id"]):
        time.sleep(PAUSE_S)
    return batch


async def running(split: asyncsplit.AsyncDataIterator) -> None:
    """Return once the epoch has begun."""
    while (await split.status()).phase != "running":  # noqa: ASYNC110 - it is elsewhere
        await asyncio.sleep(0.1)


async def ask_for_the_schema(split: asyncsplit.AsyncDataIterator) -> None:
    """Ask in the middle of an epoch: in vain, and for that of its blocks."""
    with contextlib.suppress(asyncsplit.ExecutionActiveError):
        await split.schema()
    await split.schema(during_execution="observed")


def start(split: asyncsplit.AsyncDataIterator) -> Any:
    """Return a worker in a process of its own."""
    return ray.remote(Worker).options(num_cpus=0).remote(split)


def main() -> None:
    """Run it."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    dataset = ray.data.range(ROWS, override_num_blocks=48)
    dataset = dataset.map_batches(slow_in_the_middle, batch_size=None)
    dataset.set_name("flights")
    telemetry = asyncsplit.TelemetryConfig(discovery_dir=sys.argv[1])
    options = asyncsplit.SplitOptions(prefetch_bytes=40_000, telemetry=telemetry)
    splits = asyncsplit.streaming_split(dataset, SPLITS, equal=True, options=options)
    workers = [start(split) for split in splits]
    for epoch in range(EPOCHS):
        late = [1] if epoch == 2 else []
        training = {i: w.train.remote() for i, w in enumerate(workers) if i not in late}
        if not late:
            asyncio.run(running(splits[0]))
            asyncio.run(ask_for_the_schema(splits[0]))
        time.sleep(PAUSE_S)
        if epoch == 1:
            ray.kill(workers[1])
            workers[1] = start(splits[1])
            late = [1]
        training |= {i: workers[i].train.remote() for i in late}
        ray.get(list(training.values()))
        if epoch == 1:
            for _ in range(2):
                asyncio.run(splits[0].schema())  # which is computed once


if __name__ == "__main__":
    main()
