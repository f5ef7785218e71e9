"""Ahead: how the executor starts for an epoch, and the epoch that it starts for too early.

Whether an epoch may start before its barrier opens is decided by `Epochs.may_start_ahead`.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from asyncsplit.distribution import Distribution
from asyncsplit.guard import Guard, Settle
from asyncsplit.telemetry.epoch_spans import EpochSpans
from asyncsplit.telemetry.state import CoordinatorState


class Prepared(NamedTuple):
    """An epoch that is started before its barrier opens."""

    distribution: Distribution
    starting: "asyncio.Task[None]"


class Ahead:
    """Starts epochs, one of them before its barrier opens, perhaps."""

    def __init__(
        self,
        guard: Guard,
        state: CoordinatorState,
        spans: EpochSpans,
        spawn: "Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]",
    ) -> None:
        """Set up; ``spawn`` runs a coroutine as a task."""
        self._guard = guard
        self._state = state
        self._spans = spans
        self._spawn = spawn
        self._prepared: Prepared | None = None

    @property
    def distribution(self) -> Distribution | None:
        """The blocks of the epoch that is started ahead, if there is one."""
        return None if self._prepared is None else self._prepared.distribution

    async def start(
        self, distribution: Distribution, epoch: int, settle: Settle | None = None
    ) -> None:
        """Start the executor for an epoch; what keeps it from starting is noted as its error.

        ``settle`` is what `drop` has returned of one started ahead in vain.
        """
        self._spans.executor_starts(epoch)
        try:
            execution = await self._guard.start(epoch, settle, lambda: not distribution.stopped)
        except Exception as error:  # the consumers get it, whatever it is
            distribution.error = self._guard.failure(error)
        else:
            if execution is not None:
                distribution.start(execution, f"asyncsplit-pump-{epoch}", self._state.pump)
        if not distribution.stopped:
            self._spans.executor_started(epoch, distribution.error)

    def begin(self, distribution: Distribution, epoch: int) -> None:
        """Start an epoch before its barrier opens."""
        starting = self._spawn(self.start(distribution, epoch))
        self._prepared = Prepared(distribution, starting)

    def take(self) -> Prepared | None:
        """Hand over the epoch started ahead, if there is one: its barrier opens."""
        prepared, self._prepared = self._prepared, None
        return prepared

    def make_way(self, *, needed: bool) -> Settle | None:
        """Give up what is executed unless it is needed, which is None; see `drop`."""
        return None if needed else self.drop() or (lambda: None)

    def drop(self) -> Settle | None:
        """Give up the epoch started ahead, if there is one; stopping the executor is the guard's.

        Returns:
            What blocks until the execution is used no more.
        """
        dropped = self.take()
        return None if dropped is None else dropped.distribution.stop()
