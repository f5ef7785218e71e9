"""The thread that takes blocks from a running execution.

It calls the executor only while some consumer has unused credit: Ray Data relaxes its
backpressure for as long as somebody waits inside ``get_next``, so a thread that always waits
there would switch backpressure off.
"""

import asyncio
import threading
from collections.abc import Callable
from time import sleep

from asyncsplit.engine import Bundle, Execution
from asyncsplit.telemetry.state import PumpClock

BURST = 32
"""How many bundles that come at once are delivered together, at most: a pull that brings all that
there is, the end of it too, saves the next one."""


class Pump:
    """Carries bundles from an execution's thread to the event loop, as far as credit goes."""

    def __init__(
        self,
        execution: Execution,
        deliver: Callable[[list[Bundle], BaseException | None], None],
        name: str,
        clock: PumpClock,
    ) -> None:
        """Start pumping once `allow` gives credit; ``clock`` is told what it waits for.

        ``deliver`` is called on the running loop with the bundles taken and, at the end, with
        `StopIteration` or the error that ended the execution.
        """
        self._deliver = deliver
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._condition = threading.Condition()
        self._credit = 0
        self._taken: list[Bundle] = []
        self._woken = False
        """Whether the loop has been told of what was taken."""
        self._stopped = False
        # The execution is the thread's alone: who waits for the thread's end must not hold it.
        self._thread = threading.Thread(target=self._run, args=(execution,), name=name, daemon=True)
        self._thread.start()

    def allow(self, credit_bytes: int) -> None:
        """Let this many bytes be taken, counting what was taken but not yet delivered."""
        with self._condition:
            self._credit = credit_bytes - sum(map(_size, self._taken))
            self._condition.notify()

    @property
    def wanting(self) -> bool:
        """Whether the thread may take a bundle: if not, it is the consumers who pause."""
        return self._credit > 0

    def stop(self) -> None:
        """Deliver nothing more; the thread ends as soon as the execution lets it go."""
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def join(self) -> None:
        """Block until the thread has ended: soon after `stop` and the execution's shutdown."""
        self._thread.join()

    def _run(self, execution: Execution) -> None:
        try:
            self._carry(execution)
        finally:
            self._clock.blocked_on(None)

    def _carry(self, execution: Execution) -> None:
        while True:
            if not self.wanting:
                self._deliver_soon()
                self._clock.blocked_on("consumers")
                with self._condition:
                    self._condition.wait_for(lambda: self._credit > 0 or self._stopped)
            if self._stopped:
                return
            self._clock.blocked_on("dataset")
            if not self._take(execution):
                return

    def _take(self, execution: Execution) -> bool:
        """Wait for the next bundle and deliver it; return False when there will be no other."""
        bundle: Bundle | None = None
        end: BaseException | None = None
        more = False
        try:
            bundle = execution.next_bundle()
            more = execution.has_output
            if not more and execution.ends_here():
                end = StopIteration()
        except BaseException as error:  # carried to those who wait for blocks
            end = error
        with self._condition:
            if self._stopped:
                return False
            if bundle is not None:
                self._credit -= _size(bundle)
                self._taken.append(bundle)
        if more and len(self._taken) % BURST:
            return True
        if not self._deliver_soon(end) or end is not None:
            return False
        if more:
            sleep(0)  # else the loop may wait for the interpreter while the rest is taken
        return True

    def _deliver_soon(self, end: BaseException | None = None) -> bool:
        """Have the loop take what is there; return False if there is no loop any more."""
        with self._condition:
            if end is None and (self._woken or not self._taken):
                return True
            self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._drain, end)
        except RuntimeError:  # the loop is closed: nobody is left to deliver to
            return False
        return True

    def _drain(self, end: BaseException | None) -> None:
        with self._condition:
            taken, self._taken, self._woken = self._taken, [], False
            if self._stopped:
                return
        if taken or end is not None:
            self._deliver(taken, end)


def _size(bundle: Bundle) -> int:
    return max(1, sum(block.size_bytes for block in bundle.blocks))
