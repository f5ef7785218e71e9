"""Ray Train with `AsyncDataConfig`: real trainers, on CPUs and with gloo."""

import asyncio
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import ray
from ray.data import DataIterator, ExecutionOptions
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from asyncsplit import AsyncDataIterator, SplitOptions
from asyncsplit.train import AsyncDataConfig
from tests.integration.consume import eventually
from tests.integration.processes import runs
from tests.integration.training import (
    BATCH,
    BLOCK_BYTES,
    EPOCHS,
    ROWS,
    STEPS,
    Log,
    dataset,
    train_async,
    train_sync,
)

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray's own defaults set the field that it has deprecated.
    pytest.mark.filterwarnings("ignore:`ExecutionOptions.exclude_resources` is deprecated"),
]

KILLED_AT = STEPS + 6
"""A step in the middle of the second epoch, after which nothing was saved."""

Fit = Callable[..., Log]


@pytest.fixture(scope="module")
def store_bytes(ray_cluster: None) -> float:
    """Return how much of the object store was free before anybody trained."""
    return float(ray.available_resources()["object_store_memory"])


@pytest.fixture(scope="module")
def fit(store_bytes: float, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fit]:
    """Return a function that trains."""

    def fit(
        train: Callable[[dict[str, Any]], None],
        workers: int,
        *,
        aborted: bool = False,
        **config: Any,
    ) -> Log:
        log = Log(tmp_path_factory.mktemp("train"))
        data_config = AsyncDataConfig(
            execution_options=ExecutionOptions(preserve_order=True), sync=train is train_sync
        )
        trainer = TorchTrainer(
            train,
            train_loop_config={"log": str(log.folder), "data_config": data_config, **config},
            datasets={"train": dataset()},
            dataset_config=data_config,
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.1}),
            run_config=RunConfig(
                storage_path=str(log.folder), failure_config=FailureConfig(max_failures=1)
            ),
        )
        if aborted:
            abort(trainer, log)
        else:
            saved = trainer.fit().best_checkpoints or []
            log.checkpoints = {metrics["step"]: checkpoint for checkpoint, metrics in saved}
        return log

    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        # By default a group that has ended, or failed, is not looked at for up to 2 s.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        yield fit
    signal.signal(signal.SIGINT, handler)


def abort(trainer: TorchTrainer, log: Log) -> None:
    """Train until somebody has stopped, then press Ctrl-C."""
    over = threading.Event()

    def press() -> None:
        while not over.wait(0.05):
            if log.stopped.exists():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(SystemExit):
            trainer.fit()
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def uninterrupted(fit: Fit) -> Log:
    """Return the log of whole epochs, and of one more that was left with Ctrl-C."""
    return fit(train_async, 2, aborted=True, epochs=EPOCHS + 1, stop_at=EPOCHS * STEPS + 3)


def test_each_row_comes_once_and_all_ranks_have_the_same_number_of_batches(
    uninterrupted: Log,
) -> None:
    steps = [uninterrupted.steps(rank) for rank in range(2)]
    for epoch in range(EPOCHS):
        for of_rank in steps:
            assert [len(step.ids) for step in of_rank if step.epoch == epoch] == [BATCH] * STEPS
        ids = [i for of_rank in steps for step in of_rank if step.epoch == epoch for i in step.ids]
        assert sorted(ids) == list(range(ROWS))
    assert steps[0][-1].loss < steps[0][0].loss / 2


@pytest.fixture(scope="module")
def killed(fit: Fit) -> Log:
    """With iterators for code that knows no event loop."""
    return fit(train_sync, 2, epochs=EPOCHS, stop_at=KILLED_AT, kill=True)


@pytest.mark.deep
def test_a_killed_group_goes_on_in_the_middle_of_the_epoch_as_if_nothing_had_been(
    killed: Log, uninterrupted: Log
) -> None:
    assert killed.stopped.exists()
    for rank in range(2):
        steps = killed.steps(rank)
        numbers = [step.step for step in steps]
        saved = numbers[KILLED_AT] - 1
        assert saved in (10, 15), "whichever Ray Train had taken note of"
        assert saved % STEPS, "in the middle of an epoch"
        again = range(saved + 1, EPOCHS * STEPS + 1)
        assert numbers == [*range(1, KILLED_AT + 1), *again]
        expected = uninterrupted.steps(rank)
        assert steps == [expected[number - 1] for number in numbers], "rows and losses alike"


@pytest.mark.deep
def test_nothing_is_left_of_a_run_that_was_restarted_or_aborted_in_an_epoch(
    uninterrupted: Log, killed: Log, store_bytes: float
) -> None:
    assert uninterrupted.steps(1)[-1].epoch == EPOCHS, "aborted in the middle of one more"
    coordinators = uninterrupted.coordinators() + killed.coordinators()
    assert len(coordinators) == 3, "one for each group"

    async def nothing_left() -> bool:
        # Ray's controller stays until the next run or the end of the process, and keeps some.
        held = store_bytes - ray.available_resources().get("object_store_memory", 0)
        return held < BLOCK_BYTES and not any(map(runs, coordinators))

    asyncio.run(eventually(nothing_left, 60))


@pytest.mark.deep
def test_another_number_of_ranks_shares_what_is_left_and_one_needs_no_workers(
    fit: Fit, killed: Log, uninterrupted: Log
) -> None:
    saved = max(killed.checkpoints)
    assert EPOCHS * STEPS - STEPS < saved < EPOCHS * STEPS, "in the middle of the last epoch"
    alone = fit(train_async, 0, epochs=EPOCHS + 1, checkpoint=killed.checkpoints[saved])
    begun = [s for rank in range(2) for s in uninterrupted.steps(rank) if s.step <= saved]
    for epoch in range(EPOCHS - 1, EPOCHS + 1):
        steps = [s for s in begun + alone.steps(0) if s.epoch == epoch]
        assert sorted(i for s in steps for i in s.ids) == list(range(ROWS))


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


def test_replicas_of_a_split_go_to_successive_ranks() -> None:
    config = AsyncDataConfig(["train"], options=SplitOptions(replicas=2))
    datasets = {"train": ray.data.range(10), "val": ray.data.range(10)}

    def where(it: Any) -> tuple[int, int, int]:
        return it.split_index, it.replica_index, it.world_size()

    shards: Any = config.configure(datasets, 4, None, None)
    assert [where(rank["train"]) for rank in shards] == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    assert [where(rank["val"]) for rank in shards] == [(0, 0, 1)] * 4, "whole, for each"
    with pytest.raises(ValueError, match=r"'train' cannot be split among 3 workers with .*=2"):
        config.configure(datasets, 3, None, None)
