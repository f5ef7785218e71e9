"""What is known of the coordinators that somebody watches, from round to round of scrapes."""

import urllib.error
from collections import deque
from collections.abc import Mapping

from asyncsplit.telemetry import troubles
from asyncsplit.telemetry.present import History, Present, Scrape, SortKey
from asyncsplit.telemetry.scrape import Samples

PATIENCE_S = 10.0
"""Seconds for which a coordinator that is gone is kept: it may come back."""
EVENTS, CURRENT = 4, 6
"""Warnings of each coordinator: the latest of what has happened, and some of what is so now."""


class Watched:
    """One coordinator."""

    def __init__(self, url: str) -> None:
        """Begin with nothing known."""
        self.url = url
        self.problem: str | None = None
        """Why there is nothing newer, if so."""
        self.gone_at: float | None = None
        self._history: History | None = None
        self._events: deque[str] = deque(maxlen=EVENTS)

    def take(self, answer: Samples | Exception, at: float, clock: str) -> None:
        """Take what the endpoint answered at some time, written for people in ``clock``."""
        if isinstance(answer, Samples):
            history = self._history or History()
            try:
                previous = history.add(Scrape(at, answer))
                history.present()
            except KeyError as error:
                answer = ValueError(f"these are no metrics of asyncsplit: {error.args[0]}")
            else:
                self._history = history
                self.problem = self.gone_at = None
                when = "earlier:" if previous is None else clock
                self._events.extend(f"{when} {what}" for what in troubles.new(previous, answer))
                return
        cause = answer.reason if isinstance(answer, urllib.error.URLError) else answer
        self.problem = f"no metrics: {cause or type(cause).__name__}"
        if isinstance(cause, TimeoutError):
            self.gone_at = None  # it is there, and stuck
        else:
            self.lose(at)

    def lose(self, at: float, problem: str | None = None) -> None:
        """Note that it is gone, and since when."""
        self.problem = problem or self.problem
        if self.gone_at is None:
            self.gone_at = at

    def present(self, sort: SortKey) -> Present | None:
        """Return what it did when it was last heard of; None if it never was."""
        return None if self._history is None else self._history.present(sort)

    def warnings(self, now: Present | None) -> list[str]:
        """Return what is wrong now, and what has happened."""
        current = [] if now is None or self.problem else list(troubles.current(now))
        if len(current) > CURRENT:
            current[CURRENT:] = [f"and {len(current) - CURRENT} more warnings"]
        return [*current, *self._events]


class Watch:
    """All coordinators."""

    def __init__(self) -> None:
        """Begin with none."""
        self._watched: dict[str, Watched] = {}

    def take(self, answers: Mapping[str, Samples | Exception], at: float, clock: str) -> None:
        """Take a round of answers: who is not among them has ended."""
        for url, answer in answers.items():
            self._watched.setdefault(url, Watched(url)).take(answer, at, clock)
        for url, one in tuple(self._watched.items()):
            if url not in answers:
                one.lose(at, "this coordinator has ended")
            if one.gone_at is not None and at - one.gone_at >= PATIENCE_S:
                del self._watched[url]

    @property
    def coordinators(self) -> list[Watched]:
        """Those that are there, and those that may come back if there are no others."""
        there = [one for one in self._watched.values() if one.gone_at is None]
        return there or list(self._watched.values())
