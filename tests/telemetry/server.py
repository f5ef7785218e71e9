"""A real Prometheus for tests, and its HTTP API."""

import contextlib
import json
import re
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.telemetry.test_prometheus import get, tool


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
            yield Api(listening[1])
        finally:
            server.terminate()


class Api:
    """Asks a server."""

    def __init__(self, address: str) -> None:
        self.url = f"http://{address}"

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
