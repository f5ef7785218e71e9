"""What is logged of a receiver that is away: a line at first, a few later, and one when it is back.

OpenTelemetry's exporters log each attempt of each push, for days if a job runs that long without
its receiver. What they say is kept from the log, and the first of it goes into our line.
"""

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

from asyncsplit.telemetry.troubles import age

REMINDER_S = 60.0
"""When a failure that goes on is told of a second time; then after twice as long, and so on."""

_said: ContextVar[list[str] | None] = ContextVar("_said", default=None)


class Complaints:
    """Puts pushes to one receiver into words, where that is worth a line of the log.

    Times are seconds of any clock that moves forward.
    """

    __slots__ = ("_due_s", "_since", "_what", "_what_then")

    def __init__(self, what: str, what_then: str) -> None:
        """Begin with nothing pushed.

        Args:
            what: What goes where, such as "Metrics to X".
            what_then: A sentence on what becomes of it while it fails.
        """
        self._what = what
        self._what_then = what_then
        self._since: float | None = None
        self._due_s = 0.0

    @property
    def failing(self) -> bool:
        """Whether the last push has failed."""
        return self._since is not None

    def failed(self, now: float, why: object) -> str | None:
        """Note that a push has failed; return what to log."""
        why = str(why).rstrip(".")
        if self._since is None:
            self._since, self._due_s = now, REMINDER_S
            return (
                f"{self._what} do not arrive: {why}. {self._what_then} Everything else works. If it"
                " goes on, it is told of again, less and less often."
            )
        failing_s = now - self._since
        if failing_s < self._due_s:
            return None
        self._due_s = 2 * failing_s
        return f"{self._what} have not arrived for {age(failing_s)}: {why}"

    def arrived(self, now: float) -> str | None:
        """Note that a push has arrived; return what to log."""
        if self._since is None:
            return None
        failing_s, self._since = now - self._since, None
        return f"{self._what} arrive again, after {age(failing_s)}"


@contextlib.contextmanager
def overheard(exporter: str) -> Iterator[list[str]]:
    """Keep what an exporter logs in this thread from the log; yields it, as it comes.

    ``exporter`` is the name of its logger. Others that use the same exporter go on logging.
    """
    logging.getLogger(exporter).addFilter(_keep)  # once, however often it is added
    said: list[str] = []
    token = _said.set(said)
    try:
        yield said
    finally:
        _said.reset(token)


def _keep(record: logging.LogRecord) -> bool:
    said = _said.get()
    if said is not None:
        said.append(record.getMessage())
    return said is None
