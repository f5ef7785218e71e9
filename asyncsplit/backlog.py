"""Backlog: what was delivered to a stream and not begun, and how its blocks get here."""

import itertools
import math
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import ray

from asyncsplit import engine, plain
from asyncsplit.wire import Slice

SMALL_BYTES = 2**20
"""Blocks up to this size are fetched together, at a fraction of what one call each costs; larger
ones are asked for ahead, because it takes time if they come from another node."""

GROUP_BYTES = 4 * 2**20
GROUP_SLICES = 32
"""Bounds of one such group: together they keep the loop for about a millisecond."""

HERE_BYTES = 32 * 2**20
"""Larger blocks are fetched together up to so many bytes, but for those of other nodes."""


@dataclass(slots=True)
class _Pending:
    slice: Slice
    fetch: "Future[Any] | None" = None
    overdue_at: float = math.inf
    packed: engine.Packed | None = None
    sent_for: bool = False
    """Whether it was asked for ahead, being small and on another node."""

    @property
    def is_here(self) -> bool:
        return self.packed is not None or (self.fetch is not None and self.fetch.done())


class Backlog:
    """A stream's slices, in order; nothing here waits."""

    def __init__(self, *, prefetch_batches: int, batch_size: int | None, plain: bool) -> None:
        """Start without slices; ``plain`` says whether blocks may come as `asyncsplit.plain`'s."""
        self.size_bytes = 0
        """Of all slices."""
        self.node_id = engine.node_id()
        """The node that this process runs on."""
        self._prefetch = prefetch_batches
        self._batch_size = batch_size
        self._plain = plain
        self._pending: deque[_Pending] = deque()

    def __len__(self) -> int:
        """Return how many slices there are."""
        return len(self._pending)

    def extend(self, slices: Iterable[Slice]) -> None:
        """Take what was delivered."""
        for part in slices:
            self._pending.append(_Pending(part))
            self.size_bytes += part.size_bytes

    def clear(self) -> None:
        """Let go of everything."""
        self._pending.clear()
        self.size_bytes = 0

    def fetch(self) -> "Future[Any] | None":
        """Have blocks on their way; return what to wait for if that of the first is not here."""
        self._fetch_ahead()
        head = self._pending[0]
        if head.fetch is None and head.packed is None and (fetch := self._fetch_group()):
            head.fetch = fetch
            # Consumers of one process that were given the same block get back what they ask for
            # again only if they let go of it together: hence whole seconds.
            head.overdue_at = math.floor(perf_counter()) + 2
        return None if head.is_here else head.fetch

    @property
    def is_here(self) -> bool:
        """Whether there is a first slice, and its block is here."""
        return bool(self._pending) and self._pending[0].is_here

    @property
    def is_overdue(self) -> bool:
        """Whether to let go of everything and ask for it once more.

        Ray 2.60 can lose a small object that a process lets go of while it is given it again, as
        happens to the parts of one block: even ``ray.get`` then waits for ever.
        """
        return perf_counter() >= self._pending[0].overdue_at

    def pop(self) -> tuple[Slice, Any]:
        """Return the first slice and its block, which is here; raise like ``ray.get``.

        If that raises, the slice stays.
        """
        head = self._pending[0]
        if head.packed is not None:
            block = self._unpack(head.packed)
        else:
            assert head.fetch is not None
            block = head.fetch.result()
        self._pending.popleft()
        self.size_bytes -= head.slice.size_bytes
        return head.slice, block

    def _fetch_ahead(self) -> None:
        """Have blocks on their way for as many batches as `prefetch_batches` says.

        That is large ones, and small ones that are on another node.
        """
        wanted = self._prefetch * (self._batch_size or 1)
        afar: list[ray.ObjectRef[Any]] = []
        for place, pending in enumerate(self._pending):
            part = pending.slice
            if place and wanted <= 0:
                break
            if place:
                wanted -= part.stop - part.start if self._batch_size else 1
            if (
                part.size_bytes > SMALL_BYTES
                and pending.fetch is None
                and pending.packed is None
                and not self._get_here(place)
            ):
                pending.fetch = part.ref.future()
            elif place and part.size_bytes <= SMALL_BYTES and self._is_afar(pending):
                pending.sent_for = True
                afar.append(part.ref)
        if afar:
            # Ray goes on fetching them after this has returned.
            afar = list(dict.fromkeys(afar))
            ray.wait(afar, num_returns=len(afar), timeout=0, fetch_local=True)

    def _get_here(self, place: int) -> bool:
        """Get a block if it is here, and with it those that follow if all of them are, too."""
        group: list[_Pending] = []
        size = 0
        for pending in itertools.islice(self._pending, place, place + GROUP_SLICES):
            size += pending.slice.size_bytes
            taken = pending.fetch or pending.packed or self._is_afar(pending)
            if group and (taken or size > HERE_BYTES):
                break
            group.append(pending)
        return self._get(group) or (len(group) > 1 and self._get(group[:1]))

    def _is_afar(self, pending: _Pending) -> bool:
        if pending.sent_for or pending.packed is not None:
            return False
        return pending.slice.node_id not in (None, self.node_id)

    def _fetch_group(self) -> "Future[Any] | None":
        """Get the small blocks at the head that are here; if none is, return what to wait for."""
        group: list[_Pending] = []
        size = 0
        for pending in itertools.islice(self._pending, GROUP_SLICES):
            size += pending.slice.size_bytes
            if pending.fetch or pending.packed or (group and size > GROUP_BYTES):
                break
            group.append(pending)
        if self._get(group):
            return None
        refs = list(dict.fromkeys(pending.slice.ref for pending in group))
        here, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=True)
        ready = set(here)
        group = list(itertools.takewhile(lambda pending: pending.slice.ref in ready, group))
        if group and self._get(group):
            return None
        return self._pending[0].slice.ref.future()

    def _get(self, group: list[_Pending]) -> bool:
        """Get blocks if all of them are here; it takes no time then, whatever their size."""
        got = engine.get_packed([pending.slice.ref for pending in group])
        if got is None:
            return False
        for pending, packed in zip(group, got, strict=True):
            pending.packed = packed
        return True

    def _unpack(self, packed: engine.Packed) -> Any:
        if self._plain:
            pickled = engine.pickled(packed)
            block = None if pickled is None else plain.read(pickled)
            if block is not None:
                return block
            # Where one block is not, few of those after it will be, and trying costs.
            self._plain = False
        return engine.unpack(packed)
