"""A training loop for Ray Train that writes down each step, for tests that compare such runs."""

import asyncio
import json
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import ray
import ray.train.torch
import torch
from ray.data import DataIterator, Dataset
from ray.train import Checkpoint

from asyncsplit.train import get_dataset_shard, load_state, save_state

ROWS, EPOCHS, BATCH = 240, 2, 10
STEPS = ROWS // 2 // BATCH
"""Of an epoch, with two workers."""
SAVE_EVERY = 5
BLOCK_BYTES = 2**20


def dataset() -> Dataset:
    def features(batch: Any) -> Any:
        x = batch["id"] / np.float32(ROWS)
        payload = np.zeros((len(x), BLOCK_BYTES // len(x)), np.uint8)
        return {"id": batch["id"], "x": x, "y": 3 * x + 1, "payload": payload}

    return ray.data.range(ROWS, override_num_blocks=12).map_batches(features)


class Step(NamedTuple):
    """What a rank writes down of a training step."""

    step: int
    epoch: int
    loss: float
    ids: list[int]


class Log:
    """What a run wrote down."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        Path(folder, "coordinators").mkdir(exist_ok=True)
        self.stopped = Path(folder, "stopped")
        self.checkpoints: dict[int, Checkpoint] = {}
        """Those that were kept, by the step after which they were saved."""

    def steps(self, rank: int) -> list[Step]:
        lines = Path(self.folder, f"rank-{rank}.jsonl").read_text().splitlines()
        return [Step(*json.loads(line)) for line in lines]

    def coordinators(self) -> list[int]:
        """Return the processes of all that the run had."""
        return [int(path.name) for path in Path(self.folder, "coordinators").iterdir()]


class Loop:
    """A training loop that saves its state every few steps.

    ``config`` has the folder of the ``log`` and the number of ``epochs``, and may have a
    ``checkpoint`` of another run to go on from. The last rank can be told
    to ``stop_at`` a step, the first time it gets there, and then waits for ever, or is killed if
    the config says ``kill``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.it = get_dataset_shard("train", config.get("data_config"))
        pid = asyncio.run(self.it.status()).pid
        self.log = Log(config["log"])
        Path(config["log"], "coordinators", str(pid)).touch()
        linear = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        self.module = linear
        self.model = ray.train.torch.prepare_model(linear)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.epoch = self.step = 0
        if checkpoint := ray.train.get_checkpoint() or config.get("checkpoint"):
            with checkpoint.as_directory() as directory:
                saved = torch.load(Path(directory, "model.pt"))
                self.module.load_state_dict(saved["model"])
                self.step = saved["step"]
                self.epoch = load_state(directory, self.it)

    def save(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            if self.rank == 0:
                saved = {"model": self.module.state_dict(), "step": self.step}
                torch.save(saved, Path(directory, "model.pt"))
            save_state(directory, self.it)
            ray.train.report({"step": self.step}, checkpoint=Checkpoint.from_directory(directory))

    def train(self, batch: dict[str, np.ndarray]) -> None:
        x, y = (torch.tensor(batch[name]).float().unsqueeze(1) for name in "xy")
        loss = torch.nn.functional.mse_loss(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        mean = loss.detach() / self.world_size
        if self.world_size > 1:
            torch.distributed.all_reduce(mean)
        line = Step(self.step, self.epoch, mean.item(), batch["id"].tolist())
        with Path(self.config["log"], f"rank-{self.rank}.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        if self.step % SAVE_EVERY == 0:
            self.save()
        last = self.rank == self.world_size - 1
        if last and self.step == self.config.get("stop_at") and not self.log.stopped.exists():
            self.log.stopped.touch()
            if self.config.get("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()

    async def run(self) -> None:
        while self.epoch < self.config["epochs"]:
            async for batch in self.it.iter_batches(batch_size=BATCH):
                self.train(batch)
            self.epoch += 1


def train_async(config: dict[str, Any]) -> None:
    asyncio.run(Loop(config).run())


def train_sync(config: dict[str, Any]) -> None:
    loop = Loop(config)
    it = ray.train.get_dataset_shard("train")
    assert isinstance(it, DataIterator)
    while loop.epoch < config["epochs"]:
        for batch in it.iter_batches(batch_size=BATCH):
            loop.train(cast("dict[str, np.ndarray]", batch))
        loop.epoch += 1
