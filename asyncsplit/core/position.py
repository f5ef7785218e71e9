"""Where a consumer stands in an epoch: a few integers, of which saved states are made too."""

import zlib
from typing import NamedTuple

from asyncsplit.core.shuffle import ShuffleKey


class Past(NamedTuple):
    """How far a split of an earlier run had come in the epoch."""

    rows: int
    check: int
    """Fingerprint of the leases these rows are in."""


class Position(NamedTuple):
    """Where a consumer stands: the epoch it wants to read, and how much of it is finished."""

    epoch: int
    rows: int = 0
    """Rows of the split the training loop has finished with."""
    check: int = 0
    """Fingerprint of the leases these rows are in."""
    fed: int = 0
    """Number of the first lease it has not begun; it keeps what it has begun."""
    saved: bool = False
    """Whether it comes from a state saved by an earlier run."""
    shuffle: ShuffleKey | None = None
    """What the order of its rows is drawn from, if they are shuffled."""
    low: int = 0
    """Number of the first lease not wholly finished, if they are."""
    earlier: tuple[tuple[Past, ...], ...] = ()
    """What was read of the epoch by runs with another number of splits, one after the other: rows
    and leases are counted in what those left."""

    @property
    def has_begun(self) -> bool:
        """Whether anything of the epoch has been read."""
        return bool(self.rows or self.fed)

    def under(self, shuffle: ShuffleKey | None) -> "Position":
        """Return where to go on when rows are shuffled so from now on.

        In an order drawn otherwise nobody knows which rows are finished: then it is the first row.
        """
        if self.shuffle is None or (shuffle is not None and self.shuffle.is_like(shuffle)):
            return self
        return Position(self.epoch, saved=self.saved, earlier=self.earlier)


FINISHED = 2**62
"""More rows than any epoch has: the position of a split that has finished the epoch."""


def fingerprint(before: int, rows: int) -> int:
    """Add a lease of so many rows to the fingerprint of the leases before it."""
    return zlib.crc32(rows.to_bytes(8, "little"), before)
