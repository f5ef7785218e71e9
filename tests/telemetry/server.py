"""A real Prometheus for tests, and its HTTP API."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def get(url: str) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=10) as response:
        return str(response.read().decode())


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
    command = [
        tool("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            log = ""
            for line in server.stderr:
                log += line
                if "Server is ready" in line:
                    break
            listening = re.search(r'msg="Listening on" address=(\S+)', log)
            assert listening is not None, log
            yield Api(f"http://{listening[1]}")
        finally:
            server.terminate()


class Api:
    """Asks a server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, path: str, **parameters: str) -> Any:
        answer = get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        return json.loads(answer)["data"]

    def values(self, promql: str) -> list[float]:
        """Return the values of a query's results, now."""
        return [float(one["value"][1]) for one in self.call("query", query=promql)["result"]]

    def firing(self) -> list[tuple[str, dict[str, str]]]:
        """Return names and annotations of the alerts that fire now."""
        return [
            (alert["labels"]["alertname"], alert["annotations"])
            for alert in self.call("alerts")["alerts"]
            if alert["state"] == "firing"
        ]
