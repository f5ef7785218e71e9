"""Who keeps the others waiting, and for how long that is borne.

A wait has three bounds: a consumer known to be dead must be replaced within ``rejoin_timeout_s``,
one that is merely silent must speak within ``barrier_timeout_s``, and long before that a warning
says who is missing. Times are seconds of any clock that only moves forward.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from asyncsplit.core.readers import reader_name
from asyncsplit.errors import ConsumerLostError

FIRST_WARNING_S = 30.0


@dataclass
class Liveness:
    """When each split was last heard of, and which are known to be dead."""

    barrier_timeout_s: float | None
    rejoin_timeout_s: float | None
    replicas: int = 1
    _heard: dict[int, float] = field(default_factory=dict)
    _died: dict[int, float] = field(default_factory=dict)
    _how: dict[int, str] = field(default_factory=dict)
    _waiting_since: float | None = None
    _warn_after: float = FIRST_WARNING_S

    def hear(self, split: int, now: float) -> None:
        """Note a message from a split's consumer: it lives."""
        self._heard[split] = now
        self._died.pop(split, None)

    def mourn(self, split: int, now: float, how: str = "died") -> None:
        """Note that a split's consumer is dead, or gone otherwise, and to be replaced."""
        self._died.setdefault(split, now)
        self._how[split] = how

    def forget(self, split: int) -> None:
        """Note that nothing is expected of a split's former consumer any more."""
        self._died.pop(split, None)

    def is_dead(self, split: int) -> bool:
        """Tell whether a split's consumer is dead and not replaced."""
        return split in self._died

    def lost(self, blockers: Iterable[int], since: float, now: float) -> dict[int, str]:
        """Name the splits waited for that have had time enough, each with what is known of it.

        ``since`` is when the longest wait for one of ``blockers`` began.
        """
        return {
            split: story
            for split in blockers
            if (story := self._overdue(split, since, now)) is not None
        }

    def warning(self, blockers: Iterable[int], since: float | None, now: float) -> str | None:
        """Return what to log, if a wait that began at ``since`` is due for a warning.

        The first comes after half a minute, the next ones after twice as long each. A blocker that
        spoke within that time is slow and not worth a warning.
        """
        if since is None or since != self._waiting_since:
            self._waiting_since, self._warn_after = since, FIRST_WARNING_S
        if since is None or now - since < self._warn_after:
            return None
        stories = {
            split: self._story(split, since, now)
            for split in blockers
            if split in self._died or now - self._last_sign(split, since) >= FIRST_WARNING_S
        }
        if not stories:
            return None
        self._warn_after *= 2
        return _listing(stories, self.replicas)

    def _overdue(self, split: int, since: float, now: float) -> str | None:
        died = self._died.get(split)
        bound = self.barrier_timeout_s if died is None else self.rejoin_timeout_s
        began = self._last_sign(split, since) if died is None else died
        if bound is None or now - began < bound:
            return None
        return self._story(split, since, now)

    def _last_sign(self, split: int, since: float) -> float:
        return max(since, self._heard.get(split, since))

    def _story(self, split: int, since: float, now: float) -> str:
        if (died := self._died.get(split)) is not None:
            return f"{self._how[split]} {now - died:.0f} s ago and was not replaced"
        return f"has not been heard of for {now - self._last_sign(split, since):.0f} s"


def lost_error(epoch: int, lost: dict[int, str], replicas: int = 1) -> ConsumerLostError:
    """Return what those get who have waited for lost splits."""
    return ConsumerLostError(
        f"epoch {epoch} cannot go on: {_listing(lost, replicas)}. All splits have to be iterated at"
        " the same time. Restart the workers of these and iterate again; raise"
        " SplitOptions.barrier_timeout_s if loops pause for longer than that, or"
        " SplitOptions.rejoin_timeout_s if replacing a worker takes longer"
    )


def _listing(stories: dict[int, str], replicas: int) -> str:
    """Put what is known of several splits into one line."""
    return "; ".join(
        f"{reader_name(reader, replicas)} {story}" for reader, story in sorted(stories.items())
    )
