"""What a worker notes while it trains."""

import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from asyncsplit import BatchStream

RowIds = npt.NDArray[np.int32]


class EpochReport(NamedTuple):
    """What one worker saw of one epoch."""

    row_ids: RowIds
    batches: int
    first_batch_s: float
    """Seconds from asking for the first batch to having it."""
    wait_s: float
    """Seconds waited for batches, the first one included."""
    seconds: float
    loss: float
    """Mean over the steps; each step's is the mean of all workers."""


class Progress(NamedTuple):
    """How far one worker is."""

    epoch: int = 0
    """The epoch it is in, from 1; 0 before that."""
    epoch_rows: int = 0
    """Rows of this epoch."""
    rows: int = 0
    """Rows of all epochs."""
    wait_share: float = 0.0
    """Share of the time since training began that went into waiting for batches."""
    loss: float = math.nan
    """Mean over the steps of this epoch; NaN before the first."""

    @classmethod
    def of(cls, epochs: Sequence["Epoch"]) -> "Progress":
        """Sum up a worker's epochs."""
        if not epochs:
            return cls()
        streams = [epoch.stream.statistics() for epoch in epochs]
        return cls(
            len(epochs),
            streams[-1].rows,
            sum(stream.rows for stream in streams),
            sum(stream.wait_s for stream in streams) / (perf_counter() - epochs[0].began),
            epochs[-1].loss,
        )


class Epoch:
    """One epoch of one worker."""

    def __init__(self, stream: "BatchStream[Any]") -> None:
        """Begin the epoch that ``stream`` brings."""
        self.stream = stream
        self.began = perf_counter()
        self._seconds = 0.0
        self._row_ids: list[RowIds] = []
        self._loss_sum = 0.0

    def note(self, row_ids: npt.NDArray[np.int64], *, loss: float) -> None:
        """Note a step: the rows of its batch, and its loss."""
        self._row_ids.append(row_ids.astype(np.int32))  # a copy: a view would pin the whole block
        self._loss_sum += loss

    def end(self) -> None:
        """Note that the epoch is over."""
        self._seconds = perf_counter() - self.began

    @property
    def loss(self) -> float:
        """Mean loss so far."""
        return self._loss_sum / len(self._row_ids) if self._row_ids else math.nan

    def report(self) -> EpochReport:
        """Return what was noted."""
        statistics = self.stream.statistics()
        return EpochReport(
            np.concatenate([np.empty(0, np.int32), *self._row_ids]),
            len(self._row_ids),
            statistics.time_to_first_batch_s or 0.0,
            statistics.wait_s,
            self._seconds,
            self.loss,
        )
