"""Going on in the middle of an epoch: whether that is possible, and what is left of it."""

from collections.abc import Iterable, Mapping, Sequence

from asyncsplit.core.leases import SplitLog
from asyncsplit.core.position import FINISHED, Past, Position
from asyncsplit.core.readers import reader_names
from asyncsplit.core.routing import Equal, Part, make_router
from asyncsplit.errors import CoordinatorLostError, StateMismatchError

SAME_ORDER = (
    "the same blocks in the same order are needed for that. Set"
    " ds.context.execution_options.preserve_order = True, and routing='rows'"
)
NOT_REPEATABLE = f"cannot be resumed in the middle: {SAME_ORDER}"


def read_before(
    resume: Mapping[int, Position], n: int, epoch: int, *, repeatable: bool, replicas: int = 1
) -> tuple[tuple[Past, ...], ...]:
    """Return what runs with other numbers of splits have read of an epoch to be resumed.

    ``resume`` says where readers stand in it, of which there are ``n * replicas``;
    ``repeatable`` whether the same blocks are given to the same splits again.

    Raises:
        CoordinatorLostError: If a coordinator that died cannot be replaced in the middle.
        StateMismatchError: If the states that were loaded cannot be resumed, or not together.
    """
    if not resume:
        return ()
    elsewhere = {split: p.epoch for split, p in resume.items() if p.epoch != epoch}
    if elsewhere:
        raise StateMismatchError(
            f"{reader_names(elsewhere, replicas)} resume in epoch {max(elsewhere.values())}, and"
            f" others in epoch {epoch}: load the states of one run, saved at the same step"
        )
    saved = {split for split, position in resume.items() if position.saved}
    if saved and (without := set(range(n * replicas)) - set(resume)):
        raise StateMismatchError(
            f"{reader_names(saved, replicas)} resume in epoch {epoch}, but"
            f" {reader_names(without, replicas)} have no state of it: load the states of all splits"
            + (", into all of their replicas" if replicas > 1 else "")
        )
    if repeatable:
        earlier = {p.earlier for p in resume.values() if p.rows != FINISHED}
        if len(earlier) > 1:
            raise StateMismatchError(
                f"the splits resume epoch {epoch} from states of different runs: load the states"
                " of one run into all of them"
            )
        return earlier.pop() if earlier else ()
    if saved:
        raise StateMismatchError(f"epoch {epoch} {NOT_REPEATABLE}")
    raise CoordinatorLostError(
        f"the coordinator died and was restarted, but epoch {epoch} cannot go on where it was:"
        f" {SAME_ORDER}. The next iteration begins the next epoch"
    )


class Replay:
    """An epoch that a run with another number of splits has begun.

    Routes a dataset's parts as the earlier run did, and passes on what its splits left.
    """

    def __init__(self, splits: Sequence[Past], *, equal: Equal) -> None:
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
                if not part.padding:  # else somebody else has, or had, the same rows
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
