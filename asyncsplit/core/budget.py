"""How many bytes may wait for a split."""

PREFETCH_BYTES = 256 * 2**20
"""Enough to keep a consumer busy for as long as a dataset may stumble."""

STORE_SHARE = 1 / 8
"""How much of the object store all splits together may keep waiting. The rest is for what the
dataset itself has under way, for copies on consumers' nodes and for whoever else uses it."""


def prefetch_budget(asked: int | None, n: int, store_bytes: float | None) -> int:
    """Return how many bytes may wait for each of ``n`` splits.

    What was asked for, if anything was; else `PREFETCH_BYTES`, but no more than the split's part
    of `STORE_SHARE` of an object store of ``store_bytes`` (None if not known).
    """
    if asked is not None:
        return asked
    if store_bytes is None:
        return PREFETCH_BYTES
    return max(1, min(PREFETCH_BYTES, int(store_bytes * STORE_SHARE / n)))


def is_short(credit_bytes: int, budget_bytes: int) -> bool:
    """Tell whether more than half of what may wait for a split is missing.

    Only then is an executor that is held back to go on: if it did with each block that consumers
    finish, it would start a task for every one.
    """
    return 2 * credit_bytes > budget_bytes
