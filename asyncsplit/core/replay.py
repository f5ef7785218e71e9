"""What is left of an epoch that a run with another number of splits has begun."""

from collections.abc import Iterable, Sequence

from asyncsplit.core.ledger import Past, Position, SplitLog
from asyncsplit.core.routing import Part, make_router


class Replay:
    """Routes a dataset's parts as the earlier run did, and passes on what its splits left."""

    def __init__(self, splits: Sequence[Past], *, equal: bool) -> None:
        """Start at the beginning of the epoch in which the splits had come so far."""
        self._router = make_router(len(splits), equal=equal, routing="rows")
        self._logs = [
            SplitLog(split, Position(0, past.rows, past.check)) for split, past in enumerate(splits)
        ]

    def rest(self, parts: Iterable[Part]) -> list[Part]:
        """Take the next parts; return those that are left, without the rows that were finished.

        Raises:
            StateMismatchError: If the parts are not those that the earlier run had.
        """
        for part in parts:
            self._router.add(part)
        left = []
        for split, part in self._router.assign(()):
            log = self._logs[split]
            if log.append(part):
                finished = log.skip_rows
                left.append(part.cut(finished)[1] if finished else part)
                log.acknowledge(log.assigned_rows, fed=log.next_seq)
        return left

    def finish(self) -> list[Part]:
        """Note that there are no more parts; return what was held back of them.

        Raises:
            StateMismatchError: If the dataset ended before where a split had been.
        """
        self._router.finish()
        left = self.rest(())
        for log in self._logs:
            log.finish()
        return left
