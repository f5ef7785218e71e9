"""Sharing: how a dataset is shared out, the same in all its epochs."""

from collections.abc import Iterator, Mapping, Sequence

from asyncsplit.core.budget import prefetch_budget
from asyncsplit.core.ledger import Ledger
from asyncsplit.core.position import Past, Position
from asyncsplit.core.replay import Replay, read_before
from asyncsplit.core.routing import Equal, make_router
from asyncsplit.options import SplitOptions
from asyncsplit.wire import REPORT_AFTER_S

REPORTS_PER_S = 256
"""Acknowledgements of all consumers together, at most: each takes half a millisecond of the one
thread that answers everything."""


class Sharing:
    """What the user has chosen; makes what each epoch needs for it."""

    def __init__(
        self,
        n: int,
        equal: Equal,
        hints: Sequence[str] | None,
        options: SplitOptions,
        *,
        keeps_order: bool,
    ) -> None:
        """Share among ``n`` splits; ``keeps_order`` says whether the dataset preserves order."""
        self.readers = n * options.replicas
        """How many there are to read."""
        self.replicas = options.replicas
        self._n = n
        self._equal: Equal = equal
        # Ray Data ignores locality where order must be kept; so do we, or the same blocks would
        # not be routed the same way twice.
        self._hints = None if keeps_order else hints
        self._routing = options.routing
        self.repeatable = keeps_order and options.routing == "rows"
        """Whether an epoch can go on in the middle, because each split would be given the same."""
        self._budget = prefetch_budget(options.prefetch_bytes, n, None)
        self.on_demand = options.routing == "demand"
        # What is given on demand is asked for when the last of it is begun.
        self.prefetch_bytes = 1 if self.on_demand else self._budget
        """How many bytes a consumer is to keep ahead."""
        self.report_after_s = max(REPORT_AFTER_S, self.readers / REPORTS_PER_S)
        """How long what a consumer has finished with may stay unacknowledged."""

    def ledger(
        self, resume: Mapping[int, Position] | None = None, earlier: Ledger | None = None
    ) -> Ledger:
        """Return the ledger of an epoch that goes on where ``resume`` says.

        ``earlier`` is that of an epoch before: consumers are expected to be as fast as there.
        """
        router = make_router(self._n, equal=self._equal, routing=self._routing, hints=self._hints)
        if earlier is not None:
            router.go_on_from(earlier.router)
        return Ledger(self._n, router, self._budget, resume, self.replicas)

    def read_before(
        self, resume: Mapping[int, Position], epoch: int
    ) -> tuple[tuple[Past, ...], ...]:
        """Return what other numbers of splits have read of an epoch; see `read_before`.

        Raises:
            CoordinatorLostError, StateMismatchError: as that function.
        """
        return read_before(
            resume, self._n, epoch, repeatable=self.repeatable, replicas=self.replicas
        )

    def replays(self, earlier: tuple[tuple[Past, ...], ...]) -> Iterator[Replay]:
        """Yield what leaves out that again."""
        return (Replay(splits, equal=self._equal) for splits in earlier)
