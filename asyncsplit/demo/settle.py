"""Waits until the coordinator has heard of everything its workers did."""

import asyncio

from asyncsplit.telemetry.scrape import Samples, fetch

PATIENCE_S = 10.0
"""Seconds the metrics may take."""
POLL_S = 0.05


async def settled(url: str, epochs: int) -> Samples:
    """Return the metrics, once they say that so many epochs are over.

    Workers count for themselves, and do not wait for the arrival of their last totals.

    Raises:
        OSError: If the endpoint does not answer, or not in time with so many epochs.
    """
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                # Blocks its thread, not the loop.
                samples = Samples.parse(await asyncio.to_thread(fetch, url, PATIENCE_S))
                if samples.total("asyncsplit_epochs_total") >= epochs:
                    return samples
                await asyncio.sleep(POLL_S)
    except OSError as error:
        raise OSError(
            f"the metrics at {url} do not tell of {epochs} epochs within {PATIENCE_S:g} s:"
            f" {str(error) or 'it takes too long'}. Has the coordinator been killed?"
        ) from error
