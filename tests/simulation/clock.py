"""An event loop whose time passes only when nothing is left to do."""

import asyncio
import selectors
from collections.abc import Callable
from typing import Any


class StuckError(AssertionError):
    """Somebody waits, and nothing will ever happen again."""


class _NoFiles(selectors.SelectSelector):
    """Waits for nothing but time, which it moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StuckError("everybody waits for somebody else")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs callbacks at once, timers in their order, blocking calls inline and late."""

    def __init__(self) -> None:
        self._files = _NoFiles()
        super().__init__(self._files)
        self.after_step: Callable[[], None] = lambda: None
        self.seconds_of: Callable[..., float] = lambda func, *args: 0.0
        """How long a blocking call takes."""

    def start_at(self, now: float) -> None:
        """Have time begin where it ended on another loop."""
        self._files.now = now

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._files.now

    def _run_once(self) -> None:
        # asyncio runs what is due within its clock's resolution; while others are at work, time
        # would not get there, and who then sets the timer again would do it for ever.
        if self._scheduled:  # type: ignore[attr-defined]
            due_at: float = self._scheduled[0].when()  # type: ignore[attr-defined]
            if due_at <= self.time() + self._clock_resolution:  # type: ignore[attr-defined]
                self._files.now = max(self.time(), due_at)
        super()._run_once()  # type: ignore[misc]
        self.after_step()

    def _write_to_self(self) -> None:
        """Nobody sleeps in `select`, so nobody has to be woken there."""

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """Make a blocking call, and be done after as long as it takes."""
        done: asyncio.Future[Any] = self.create_future()

        def call() -> None:
            if done.cancelled():
                return
            try:
                done.set_result(func(*args))
            except Exception as error:
                done.set_exception(error)

        self.call_later(self.seconds_of(func, *args), call)
        return done
