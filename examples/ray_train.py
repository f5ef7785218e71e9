"""Ray Train with PyTorch: two workers on CPUs, which save where they stand in the data.

``python examples/ray_train.py --crash`` kills a worker in the middle of an epoch, once. The group
is started anew and goes on with the batch after the last one that is in a checkpoint.
"""

import argparse
import asyncio
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.data import ExecutionOptions
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from asyncsplit.train import AsyncDataConfig, get_dataset_shard, load_state, save_state

SAVE_EVERY = 5


async def train(epochs: int, crash_at: int | None) -> None:
    """Fit y = 3 x; this runs in each worker, and again in each after a restart."""
    shard = get_dataset_shard("train")
    linear = torch.nn.Linear(1, 1)
    model = prepare_model(linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank = ray.train.get_context().get_world_rank()
    epoch = step = 0
    if checkpoint := ray.train.get_checkpoint():
        crash_at = None
        with checkpoint.as_directory() as directory:
            saved = torch.load(Path(directory, "model.pt"))
            linear.load_state_dict(saved["model"])
            step = saved["step"]
            epoch = load_state(directory, shard)
        if rank == 0:
            print(f"goes on in epoch {epoch}, after step {step}")
    while epoch < epochs:
        async for batch in shard.iter_batches(batch_size=50):
            x = torch.as_tensor(batch["id"] / 1000).float().unsqueeze(1)
            loss = (model(x) - 3 * x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % SAVE_EVERY == 0:
                with tempfile.TemporaryDirectory() as directory:
                    if rank == 0:
                        saved = {"model": linear.state_dict(), "step": step}
                        torch.save(saved, Path(directory, "model.pt"))
                    save_state(directory, shard)
                    ray.train.report(
                        {"step": step, "epoch": epoch, "loss": loss.item()},
                        checkpoint=Checkpoint.from_directory(directory),
                    )
            if rank == 1 and step == crash_at:
                os.kill(os.getpid(), signal.SIGKILL)
        epoch += 1


def train_worker(config: dict[str, Any]) -> None:
    """Begin the event loop: Ray Train does not await a training function."""
    asyncio.run(train(**config))


def main() -> None:
    """Run the trainer. Ctrl-C ends the run, and with it all that it has started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--crash", action="store_true")
    args = parser.parse_args()

    crash_at = args.rows // 100 + SAVE_EVERY + 3 if args.crash else None
    with tempfile.TemporaryDirectory() as storage:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"epochs": args.epochs, "crash_at": crash_at},
            datasets={"train": ray.data.range(args.rows)},
            # In order, or no position could be found again.
            dataset_config=AsyncDataConfig(execution_options=ExecutionOptions(preserve_order=True)),
            # Leave CPUs to the dataset: workers that take all of them keep it waiting for ever.
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(
                storage_path=storage, failure_config=FailureConfig(max_failures=1)
            ),
        )
        metrics = trainer.fit().metrics or {}
    print("steps:", metrics["step"], "epochs:", metrics["epoch"] + 1)


if __name__ == "__main__":
    main()
