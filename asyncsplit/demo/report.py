"""Whether the demo did what it says it does."""

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import numpy as np

from asyncsplit.demo.record import EpochReport, RowIds


class Check(NamedTuple):
    """A claim, checked."""

    passed: bool
    finding: str


def judge(workers: Sequence[Sequence[EpochReport]], rows: int) -> list[Check]:
    """Check what each worker saw of epochs of so many rows."""
    epochs = list(zip(*workers, strict=True))
    return [
        exactly_once([[seen.row_ids for seen in epoch] for epoch in epochs], rows),
        loss_fell([epoch[0].loss for epoch in epochs]),
    ]


def exactly_once(epochs: Sequence[Sequence[RowIds]], rows: int) -> Check:
    """Check that each epoch brought each row to one worker, and the same number to all.

    Args:
        epochs: For each epoch, the ids that each worker saw.
        rows: Rows of the dataset; their ids are 0 to ``rows - 1``.
    """
    workers = len(epochs[0])
    left_out = rows % workers
    for number, epoch in enumerate(epochs, 1):
        times = np.bincount(np.concatenate(epoch), minlength=rows)
        doubled, missing = int((times > 1).sum()), int((times == 0).sum())
        shares = [len(row_ids) for row_ids in epoch]
        if doubled or missing != left_out or len(set(shares)) > 1:
            return Check(
                False,
                f"not exactly once: in epoch {number} {doubled:,} rows were seen more than once and"
                f" {missing:,} never; expected 0 and {left_out}, and equal shares (they are"
                f" {', '.join(f'{share:,}' for share in shares)})",
            )
    dropped = f"; {left_out} left out for equal shares" if left_out else ""
    return Check(
        True,
        f"exactly once: in every epoch {rows - left_out:,} of {rows:,} rows, none lost, none"
        f" doubled{dropped}",
    )


def loss_fell(losses: Sequence[float]) -> Check:
    """Check that the last epoch's loss is below the first's.

    A single epoch is compared with a model that knows nothing: it says 1/2 to everything.
    """
    path = [f"{loss:.4f}" for loss in losses]
    first = losses[0]
    if len(losses) == 1:
        first = log(2)
        path.insert(0, f"{first:.4f} (untrained)")
    fell = losses[-1] < first
    return Check(fell, f"the loss {'fell' if fell else 'did not fall'}: {' -> '.join(path)}")
