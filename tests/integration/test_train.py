"""Ray Train with `AsyncDataConfig`: real trainers, on CPUs and with gloo."""

import asyncio
import json
import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import ray
import ray.train.torch
import torch
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import Checkpoint, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from asyncsplit import AsyncDataIterator, SplitOptions
from asyncsplit.train import AsyncDataConfig, get_dataset_shard, load_state, save_state
from tests.integration.consume import eventually
from tests.integration.processes import runs

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray's own defaults set the field that it has deprecated.
    pytest.mark.filterwarnings("ignore:`ExecutionOptions.exclude_resources` is deprecated"),
]

ROWS, EPOCHS, BATCH = 240, 2, 10
STEPS = ROWS // 2 // BATCH
"""Of an epoch, with two workers."""
SAVE_EVERY = 5
BLOCK_BYTES = 2**20
KILLED_AT = STEPS + 8
"""A step in the middle of the second epoch."""


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


class Loop:
    """A training loop that saves its state every few steps, and can be killed once."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.it = get_dataset_shard("train", config.get("data_config"))
        pid = asyncio.run(self.it.status()).pid
        Path(config["log"], "coordinators", str(pid)).touch()
        linear = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        self.module = linear
        self.model = ray.train.torch.prepare_model(linear)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.epoch = self.step = 0
        self.log = Path(config["log"], f"rank-{self.rank}.jsonl")
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
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        if self.step % SAVE_EVERY == 0:
            self.save()
        killed = Path(self.config["log"], "killed")
        if self.rank == 1 and self.step == self.config.get("kill_at") and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    async def run(self) -> None:
        while self.epoch < EPOCHS:
            async for batch in self.it.iter_batches(batch_size=BATCH):
                self.train(batch)
            self.epoch += 1


def train_async(config: dict[str, Any]) -> None:
    asyncio.run(Loop(config).run())


def train_sync(config: dict[str, Any]) -> None:
    loop = Loop(config)
    it = ray.train.get_dataset_shard("train")
    assert isinstance(it, DataIterator)
    while loop.epoch < EPOCHS:
        for batch in it.iter_batches(batch_size=BATCH):
            loop.train(cast("dict[str, np.ndarray]", batch))
        loop.epoch += 1


class Run(NamedTuple):
    result: Result
    log: Path

    def coordinators(self) -> list[int]:
        """Return the processes of all that the run had."""
        return [int(path.name) for path in Path(self.log, "coordinators").iterdir()]

    def steps(self, rank: int) -> list[Step]:
        lines = Path(self.log, f"rank-{rank}.jsonl").read_text().splitlines()
        return [Step(*json.loads(line)) for line in lines]

    def checkpoint(self, step: int) -> Checkpoint:
        assert self.result.best_checkpoints is not None
        found = {metrics["step"]: saved for saved, metrics in self.result.best_checkpoints}
        return cast("Checkpoint", found[step])


Fit = Callable[..., Run]


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Return a function that trains, and sees to it that nothing is left of the run."""

    def fit(train: Callable[[dict[str, Any]], None], workers: int, **config: Any) -> Run:
        folder = tmp_path_factory.mktemp("train")
        Path(folder, "coordinators").mkdir()
        free = ray.available_resources()["object_store_memory"]
        data_config = AsyncDataConfig(
            execution_options=ExecutionOptions(preserve_order=True), sync=train is train_sync
        )
        trainer = TorchTrainer(
            train,
            train_loop_config={"log": str(folder), "data_config": data_config, **config},
            datasets={"train": dataset()},
            dataset_config=data_config,
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.1}),
            run_config=RunConfig(
                storage_path=str(folder), failure_config=FailureConfig(max_failures=1)
            ),
        )
        run = Run(trainer.fit(), folder)
        del trainer

        async def nothing_left() -> bool:
            # Ray's controller stays until the next run or the end of the process, and keeps some.
            held = free - ray.available_resources().get("object_store_memory", 0)
            return held < BLOCK_BYTES and not any(map(runs, run.coordinators()))

        if workers:  # else all is in this process, and Ray keeps the dataset
            asyncio.run(eventually(nothing_left, 60))
        return run

    return fit


@pytest.fixture(scope="module")
def uninterrupted(fit: Fit) -> Run:
    return fit(train_async, 2)


def test_each_row_comes_once_and_all_ranks_have_the_same_number_of_batches(
    uninterrupted: Run,
) -> None:
    steps = [uninterrupted.steps(rank) for rank in range(2)]
    for epoch in range(EPOCHS):
        for of_rank in steps:
            assert [len(step.ids) for step in of_rank if step.epoch == epoch] == [BATCH] * STEPS
        ids = [i for of_rank in steps for step in of_rank if step.epoch == epoch for i in step.ids]
        assert sorted(ids) == list(range(ROWS))
    assert steps[0][-1].loss < steps[0][0].loss / 2


def test_a_killed_group_goes_on_in_the_middle_of_the_epoch_as_if_nothing_had_been(
    fit: Fit, uninterrupted: Run
) -> None:
    killed = fit(train_async, 2, kill_at=KILLED_AT)
    assert Path(killed.log, "killed").exists()
    for rank in range(2):
        steps = killed.steps(rank)
        numbers = [step.step for step in steps]
        saved = numbers[KILLED_AT] - 1
        assert saved in (10, 15, 20), "whichever Ray Train had taken note of"
        assert saved % STEPS, "in the middle of an epoch"
        again = range(saved + 1, EPOCHS * STEPS + 1)
        assert numbers == [*range(1, KILLED_AT + 1), *again]
        expected = uninterrupted.steps(rank)
        assert steps == [expected[number - 1] for number in numbers], "rows and losses alike"


def test_another_number_of_workers_shares_what_is_left_of_the_epoch(
    fit: Fit, uninterrupted: Run
) -> None:
    """With iterators for code that knows no event loop."""
    step = STEPS + SAVE_EVERY
    resumed = fit(train_sync, 1, checkpoint=uninterrupted.checkpoint(step - step % SAVE_EVERY))
    begun = [s for rank in range(2) for s in uninterrupted.steps(rank)]
    rest = resumed.steps(0)
    assert {s.epoch for s in rest} == {1}
    ids = [i for s in begun if s.epoch == 1 and s.step < rest[0].step for i in s.ids]
    assert 0 < len(ids) < ROWS
    assert sorted(ids + [i for s in rest for i in s.ids]) == list(range(ROWS))


def test_without_workers_the_same_function_trains(fit: Fit) -> None:
    run = fit(train_async, 0)
    assert [i for step in run.steps(0) for i in step.ids] == [*range(ROWS)] * EPOCHS


@pytest.fixture
def shards() -> Callable[..., list[Any]]:
    """Return a function that configures a dataset for two workers on an event loop."""

    def shards(config: AsyncDataConfig, name: str = "train") -> list[Any]:
        async def configure() -> list[dict[str, DataIterator]]:
            node = ray.get_runtime_context().get_node_id()
            return config.configure({name: dataset()}, 2, None, [node, node])

        return [shard[name] for shard in asyncio.run(configure())]

    return shards


@pytest.mark.usefixtures("detect_blocking")
def test_a_dataset_that_is_not_split_is_read_whole_by_all(shards: Callable[..., list[Any]]) -> None:
    whole = shards(AsyncDataConfig(datasets_to_split=["train"], sync=True), "val")
    assert [it.world_size() for it in whole] == [1, 1]
    for it in whole:
        assert sorted(row["id"] for row in it.iter_rows()) == list(range(ROWS))
    assert len(pickle.dumps(whole[0])) < 2000, "without the dataset"


def test_a_coordinator_ends_with_the_workers_of_its_group(
    shards: Callable[..., list[Any]], start: Callable[..., Any]
) -> None:
    """Although Ray Train, in whose place this test is, keeps the iterators it has sent."""
    named = {"train": ExecutionOptions(preserve_order=True)}
    config = deepcopy(
        AsyncDataConfig(execution_options=named, options=SplitOptions(prefetch_bytes=1, epochs=9))
    )
    its: list[AsyncDataIterator] = shards(config)
    context = asyncio.run(its[0].get_context())
    assert context.execution_options.preserve_order, "options are those of the dataset's name"
    coordinator = asyncio.run(its[0].status()).pid
    readers = [start(it) for it in its]
    assert all(ray.get([reader.next.remote() for reader in readers]))
    with pytest.raises(RuntimeError, match="sent to its worker"):
        pickle.dumps(its[0])
    assert runs(coordinator)
    for pid in ray.get([reader.pid.remote() for reader in readers]):
        os.kill(pid, signal.SIGKILL)

    async def ended() -> bool:
        return not runs(coordinator)

    asyncio.run(eventually(ended, 60))
