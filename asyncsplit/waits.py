"""Waits: looks after those who wait, once a second.

Who has kept the others waiting for too long is decided in `asyncsplit.core.liveness`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from asyncsplit.core.epochs import Epochs, Phase
from asyncsplit.core.liveness import Liveness
from asyncsplit.core.readers import reader_name, reader_names
from asyncsplit.distribution import Distribution
from asyncsplit.guard import Guard
from asyncsplit.options import SplitOptions
from asyncsplit.telemetry.state import CoordinatorState

logger = logging.getLogger(__name__)

TICK_S = 1.0
"""How often waits are looked after."""


class Waits:
    """Warns of waits that take long, and ends those that have taken too long."""

    def __init__(
        self,
        epochs: Epochs,
        options: SplitOptions,
        guard: Guard,
        state: CoordinatorState,
        distributions: "Callable[[], Sequence[Distribution]]",
        lose: Callable[[dict[int, str]], None],
    ) -> None:
        """Look after nothing yet.

        ``distributions`` returns the epoch's that is under way and the next one's, if it was
        started; ``lose`` is told which readers are lost, each with what is known of it.
        """
        self.liveness = Liveness(
            options.barrier_timeout_s, options.rejoin_timeout_s, options.replicas
        )
        self.arrived_at: dict[int, float] = {}
        """When readers came to the barrier the last time."""
        self._epochs = epochs
        self._options = options
        self._guard = guard
        self._state = state
        self._distributions = distributions
        self._lose = lose
        self._ticking = False

    def tick(self) -> float:
        """Return the time, and see to it that waits are looked after once a second."""
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(TICK_S, self._look)
            self._state.tick_in(TICK_S)
        return time.monotonic()

    def hear(self, reader: int) -> None:
        """Note a message from a reader's consumer: it lives."""
        self.liveness.hear(reader, self.tick())

    def mourn(self, reader: int, how: str = "died") -> None:
        """Note that a reader's consumer is dead, or gone otherwise, and to be replaced."""
        self.liveness.mourn(reader, self.tick(), how)

    def bury(self, reader: int) -> None:
        """Note that a reader's consumer is dead, and say so."""
        self.mourn(reader)
        self._state.deaths += 1
        logger.warning(
            "the consumer of %s died in epoch %d; another one that iterates the split goes on from"
            " its first uncommitted row",
            reader_name(reader, self._options.replicas),
            self._epochs.epoch,
        )

    def _look(self) -> None:
        self._ticking = False
        self._state.ticked()
        epochs, (distribution, *ahead) = self._epochs, self._distributions()
        if not (epochs.active or epochs.arrived or ahead):
            return
        now = self.tick()
        if (ahead[0] if ahead else distribution).paused:
            self._guard.excuse_pause()
        waiting = epochs.waiting
        barrier = [self.arrived_at[split] for split in waiting]
        pulls = distribution.waiting_since
        blockers = set(epochs.missing if barrier else ())
        if pulls and epochs.phase is Phase.RUNNING:
            blockers.update(distribution.ledger.blockers())
        elif not barrier and all(map(self.liveness.is_dead, epochs.active)):
            blockers.update(epochs.active)
        since = min((*barrier, *pulls.values()), default=now) if blockers else None
        if since is None:
            return
        if lost := self.liveness.lost(blockers, since, now):
            self._lose(lost)
        elif warning := self.liveness.warning(blockers, since, now):
            logger.warning(
                "%s wait in epoch %d: %s. They give up after barrier_timeout_s=%s, or"
                " rejoin_timeout_s=%s for a dead consumer",
                reader_names({*waiting, *pulls}, self._options.replicas),
                epochs.epoch + bool(barrier),
                warning,
                self._options.barrier_timeout_s,
                self._options.rejoin_timeout_s,
            )
