"""What tests ask a real Prometheus, and what they do where there is none."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncsplit.demo import prometheus as program
from asyncsplit.telemetry.scrape import fetch


def get(url: str) -> str:
    return fetch(url, timeout_s=10)


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is missing: apt-get install --no-install-recommends prometheus"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@contextlib.contextmanager
def prometheus(config: Path, data: Path) -> Iterator["Api"]:
    """Run Prometheus with a configuration, on a port that is free."""
    with program.running(tool("prometheus"), config, data) as api:
        yield Api(api.url)


class Api(program.Api):
    """Asks a server."""

    def values(self, promql: str) -> list[float]:
        """Return the values of a query's results, now."""
        return [value for _, value in self.vector(promql)]

    def firing(self) -> list[tuple[str, dict[str, str]]]:
        """Return names and annotations of the alerts that fire now."""
        return [
            (alert["labels"]["alertname"], alert["annotations"])
            for alert in self.call("alerts")["alerts"]
            if alert["state"] == "firing"
        ]
