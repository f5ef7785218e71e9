"""Consumers that write down what they do, so that it can be read when they are dead."""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncsplit import AsyncDataIterator

STOP = "last_epoch"
"""The file that names the epoch after which to stop."""


class Consumer:
    """A training loop in a process of its own."""

    def pid(self) -> int:
        return os.getpid()

    async def run(
        self, it: AsyncDataIterator, directory: str, incarnation: int, step_s: float
    ) -> None:
        """Read epoch after epoch, until a file says which is the last one."""
        diary = os.open(
            diary_of(directory, it.split_index, incarnation), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )

        def note(**what: object) -> None:
            # Read after a SIGKILL: what one write has handed to the kernel is there.
            os.write(diary, f"{json.dumps(what)}\n".encode())

        while True:
            stream = it.iter_batches(batch_size=20)
            note(comes=True)
            rows = 0
            async for batch in stream:
                ids = batch["id"].tolist()
                note(epoch=stream.statistics().epoch, ids=ids)
                await asyncio.sleep(step_s)
                rows += len(ids)
                note(finished=rows)
            epoch = stream.statistics().epoch
            note(ended=epoch)
            if epoch is not None and epoch >= last_epoch(directory):
                return


def last_epoch(directory: str) -> float:
    """Return the epoch after which to stop, once it is decided."""
    path = Path(directory, STOP)
    return int(path.read_text()) if path.exists() else float("inf")


def note_pid(batch: Any, directory: str) -> Any:
    """Do the dataset's work on a batch: note in which process."""
    Path(directory, f"worker-{os.getpid()}").touch()
    return batch


def diary_of(directory: str, split: int, incarnation: int) -> str:
    """Return where a consumer writes."""
    return os.path.join(directory, f"split-{split}-{incarnation:04d}")


def diary(directory: str, split: int, incarnation: int) -> Iterator[dict[str, Any]]:
    """Read what a consumer wrote; it may not have had the time for anything."""
    path = Path(diary_of(directory, split, incarnation))
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())
