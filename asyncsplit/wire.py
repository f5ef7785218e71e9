"""What coordinator and consumers say to each other.

Every message carries absolute positions (epoch, stream, sequence number, rows), so repeating,
losing or reordering one does no harm. Errors travel as values: Ray would wrap an exception that
leaves an actor method, and the user should see the exception itself.
"""

import functools
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from ray import ObjectRef

from asyncsplit.core.position import Position
from asyncsplit.remote_errors import pack_error, unpack_error

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


class Lifeline(NamedTuple):
    """A process's call of `hold`, by which its death shows; see `asyncsplit.lifeline`."""

    name: str
    ref: "ObjectRef[Any]"


class Slice(NamedTuple):
    """Rows ``start`` to ``stop`` of a block."""

    ref: "ObjectRef[Any]"
    start: int
    stop: int
    size_bytes: int
    padding: bool = False
    """Whether these rows repeat others, to make shares equal."""
    node_id: str | None = None
    """The node that produced the block, which has a copy; None if unknown."""


class Delivery(NamedTuple):
    """Slices from number ``cursor`` of the split's log on; ``end`` if no others follow."""

    cursor: int
    slices: tuple[Slice, ...]
    end: bool
    skip_rows: int = 0
    """How many rows of the first slice are finished with; for a stream's first pull."""
    check: int = 0
    """Fingerprint of the slices before; for a stream's first pull."""
    skipped: tuple[int, ...] = ()
    """Rows of each of the slices before; for the first pull of a stream that shuffles."""


REPORT_AFTER_S = 1.0
"""How often a consumer acknowledges at most while it asks for nothing."""


class Started(NamedTuple):
    """The barrier has opened: read the split's log."""

    position: Position
    """Where to begin: what was finished with before this stream."""
    prefetch_bytes: int
    """How many bytes to keep ahead."""
    delivery: Delivery | None = None
    """The answer to the stream's first pull, if there is one already."""
    trace: dict[str, str] | None = None
    """W3C trace context of the epoch's span; None if it is not recorded."""
    on_demand: bool = False
    """Whether to tell the coordinator how many rows are ahead: it gives no more than is needed."""
    report_after_s: float = REPORT_AFTER_S
    """Acknowledge after so long though nothing is asked for."""
    more: bool = False
    """Whether another epoch is known to come: then arrive for it as soon as this one is over."""
    repeatable: bool = True
    """Whether the same blocks would come in the same order again, so that a state can be loaded."""

    @property
    def epoch(self) -> int:
        """The epoch to read."""
        return self.position.epoch


class Rejoin(NamedTuple):
    """The coordinator was restarted: arrive again, and say where you stand."""


class Status(NamedTuple):
    """What a coordinator is doing."""

    pid: int
    """Process id of the coordinator, on its node."""
    node_id: str
    """Id of that node."""
    epoch: int
    """The epoch under way or the last one; -1 before the first."""
    phase: str
    """``"waiting"`` at the barrier, ``"starting"`` the executor, or ``"running"``."""
    missing: list[int]
    """Splits that have not arrived at the barrier of the next epoch. Where splits have replicas,
    these are numbered instead, through all splits: as ranks are."""
    reading: list[int]
    """Splits, or replicas, that have not finished the epoch under way."""
    executing: bool
    """Whether the dataset is being executed."""
    held_bytes: int
    """Bytes of blocks that are unassigned or leased."""
    committed_rows: list[int]
    """For each split, the rows of the epoch that are committed."""
    schema_requests: dict[str, int]
    """How often the schema was asked for, by outcome: hit, miss, observed, rejected."""


class Failure(NamedTuple):
    """An error, in place of a reply."""

    packed: bytes

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Pack an error for the way."""
        return cls(pack_error(error))

    def unpack(self) -> BaseException:
        """Return the error, the remote traceback as its cause."""
        return unpack_error(self.packed)


def replies(
    method: "Callable[Concatenate[S, P], Awaitable[R]]",
) -> "Callable[[S, tuple[Any, ...]], Awaitable[R | Failure]]":
    """Make a coordinator's method take its arguments as one, and return its errors.

    Ray pickles each argument by itself: that of a pull took a third of the call.
    """

    @functools.wraps(method)
    async def reply(self: S, args: tuple[Any, ...] = ()) -> R | Failure:
        try:
            return await method(self, *args)  # type: ignore[call-arg]
        except Exception as error:
            return Failure.of(error)

    del reply.__wrapped__  # Ray would ask for its arguments
    return reply
