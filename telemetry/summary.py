"""A few lines on how delivery went, for `AsyncDataIterator.stats`."""

import heapq

from asyncsplit.telemetry.counters import ConsumerCounters
from asyncsplit.telemetry.state import CoordinatorState

MAX_SPLITS = 8
"""Splits named, those first whose training loops waited most."""


def summary(state: CoordinatorState) -> str:
    """Describe what a coordinator has delivered, and what its consumers waited for."""
    totals = [split.total for split in state.splits]
    every = state.delivered
    return "\n".join(
        (
            f"asyncsplit: dataset {state.name!r}, {len(totals)} splits,"
            f" epochs: {_counts(state.epochs)}",
            f"* Delivered: {every.rows:,} rows in {every.batches:,} batches, from"
            f" {every.blocks:,} blocks of {every.bytes / 2**20:,.1f} MiB;"
            f" {sum(state.truncated_rows.values()):,} rows truncated,"
            f" {state.padded_rows:,} padded",
            f"* Data stall: {_stall(every)}{_worst(totals)}",
            f"* Iterator: {state.serialized_bytes:,} bytes pickled,"
            f" {state.serializations:,} times; {state.conflicts:,} consumers in conflict",
            f"* Schema cache: {_counts(state.schema_requests)}",
            f"* Guard: rejections: {_counts(state.guard_rejections)};"
            f" {state.guard_lock_s:.2f} s under its lock",
        )
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {key}" for key, count in tuple(counts.items()))


def _share(total: ConsumerCounters) -> float:
    return total.wait_s / total.stream_s if total.stream_s else 0.0


def _stall(total: ConsumerCounters) -> str:
    return f"{_share(total):.1%} of {total.stream_s:,.1f} s, in {total.waits:,} waits"


def _worst(totals: list[ConsumerCounters]) -> str:
    shares = [(_share(total), -split) for split, total in enumerate(totals) if total.stream_s]
    worst = heapq.nlargest(MAX_SPLITS, shares)
    if not worst:
        return ""
    return "; by split: " + ", ".join(f"{-split}: {share:.1%}" for share, split in worst)
