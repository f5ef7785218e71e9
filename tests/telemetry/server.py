"""What tests ask a real Prometheus, and what they do where there is none."""

import contextlib
import json
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


@contextlib.contextmanager
def scraping(discovery: Path, folder: Path) -> Iterator["Api"]:
    """Run a Prometheus that scrapes what announces itself, twice a second."""
    job = {"job_name": "asyncsplit", "file_sd_configs": [{"files": [f"{discovery}/*.json"]}]}
    content = {"global": {"scrape_interval": "500ms"}, "scrape_configs": [job]}
    config = folder / "prometheus.yml"
    config.write_text(json.dumps(content))  # JSON is YAML
    with prometheus(config, folder / "data") as api:
        yield api


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
