"""Whether training waits for data, and what for, in a few words."""

from collections.abc import Mapping

STALL_HIGH = 0.2
"""Share of the loops' time from which on waiting is worth doing something about."""


def verdict(
    stall: float | None, causes: Mapping[str, float | None], blocked: Mapping[str, float | None]
) -> str:
    """Say what limits a job.

    Args:
        stall: Share of the loops' time that they wait; None if no loop has reported lately.
        causes: That share by cause: ``barrier``, ``data``, ``transfer`` and ``conversion``.
        blocked: How much the pump was blocked on the ``dataset``, and on ``consumers``.
    """
    if stall is None:
        return "unknown: no loop has reported lately"
    if stall < STALL_HIGH:
        return "training: it waits little"
    cause = max(causes, key=lambda one: causes[one] or 0.0)
    if cause == "barrier":
        return "the barrier: splits come late, or the executor starts slowly"
    if cause != "data":
        return f"{cause} of blocks"
    if (blocked.get("dataset") or 0.0) >= (blocked.get("consumers") or 0.0):
        return "the dataset: it is too slow"
    return "a slow split: its share of the data holds the others back"
