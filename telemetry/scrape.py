"""Reads coordinators' metrics as Prometheus would: over HTTP, in its text format."""

import http.client
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


class Samples:
    """What one scrape brought."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        """Keep some samples, by name."""
        self._by_name: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            self._by_name[sample.name].append(sample)

    @classmethod
    def parse(cls, text: str) -> "Samples":
        """Parse the Prometheus text format.

        Raises:
            ValueError: If it is something else.
        """
        families = text_string_to_metric_families(text)
        return cls(sample for family in families for sample in family.samples)

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the series of that name that have those labels.

        Raises:
            KeyError: If there are none.
        """
        values = [
            sample.value
            for sample in self._by_name.get(name, ())
            if labels.items() <= sample.labels.items()
        ]
        if not values:
            raise KeyError(f"the endpoint serves no {name} with {labels}")
        return sum(values)

    def by(self, label: str, name: str) -> dict[str, float]:
        """Return the values of a name's series, by one of their labels."""
        return {
            sample.labels.get(label, ""): sample.value for sample in self._by_name.get(name, ())
        }

    def labels(self, name: str) -> dict[str, str]:
        """Return the labels of the only series of that name, or those of the first.

        Raises:
            KeyError: If there is none.
        """
        if name not in self._by_name:
            raise KeyError(f"the endpoint serves no {name}")
        return self._by_name[name][0].labels


# The address is one of this node or cluster: a proxy for the web has nothing to do with it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(url: str, timeout_s: float) -> str:
    """Return what a URL serves.

    Raises:
        OSError: If that is nothing, or it does not come in time.
    """
    give_up_at = time.monotonic() + timeout_s
    chunks = []
    try:
        with _DIRECT.open(url, timeout=timeout_s) as response:
            while chunk := response.read1(1 << 16):
                chunks.append(chunk)
                if time.monotonic() > give_up_at:
                    raise TimeoutError(f"{url} was not read to its end in {timeout_s:g} s")
    except http.client.HTTPException as error:
        raise OSError(f"{url} does not speak HTTP: {error!r}") from error
    return b"".join(chunks).decode(errors="replace")


def scrape_all(urls: Iterable[str], timeout_s: float) -> dict[str, Samples | Exception]:
    """Scrape several endpoints at once; each answers in time or not at all.

    Returns:
        For each URL its samples, or why there are none: an OSError, or a ValueError if what came
        are no metrics.
    """
    answers: dict[str, Samples | Exception] = {
        url: TimeoutError(f"no answer within {timeout_s:g} s") for url in urls
    }

    def scrape(url: str) -> None:
        try:
            answers[url] = Samples.parse(fetch(url, timeout_s))
        except (OSError, ValueError) as error:
            answers[url] = error

    # Daemons: an endpoint that sends a byte now and then must not keep the process from its end.
    threads = [threading.Thread(target=scrape, args=[url], daemon=True) for url in answers]
    for thread in threads:
        thread.start()
    give_up_at = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, give_up_at - time.monotonic()))
    return dict(answers)
