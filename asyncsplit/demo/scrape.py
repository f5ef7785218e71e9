"""Reads a coordinator's metrics as Prometheus would: over HTTP, in the text format."""

import asyncio
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

PATIENCE_S = 10.0
"""Seconds the metrics may take."""
POLL_S = 0.05


@dataclass(frozen=True)
class Samples:
    """What one scrape brought."""

    samples: tuple[Sample, ...]

    @classmethod
    def parse(cls, text: str) -> "Samples":
        """Parse the Prometheus text format."""
        families = text_string_to_metric_families(text)
        return cls(tuple(sample for family in families for sample in family.samples))

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the series of that name that have those labels.

        Raises:
            KeyError: If there are none.
        """
        values = [
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not values:
            raise KeyError(f"the endpoint serves no {name} with {labels}")
        return sum(values)


async def scrape(url: str, epochs: int) -> Samples:
    """Fetch the metrics, once they say that so many epochs are over.

    Workers count for themselves, and do not wait for the arrival of their last totals.

    Raises:
        OSError: If the endpoint does not answer, or not in time with so many epochs.
    """
    async with asyncio.timeout(PATIENCE_S):
        while True:
            # Blocks its thread, not the loop.
            samples = Samples.parse(await asyncio.to_thread(_fetch, url))
            if samples.total("asyncsplit_epochs_total") >= epochs:
                return samples
            await asyncio.sleep(POLL_S)


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
        text: str = response.read().decode()
    return text
