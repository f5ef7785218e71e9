"""A Prometheus of our own, on this machine, for as long as it is needed."""

import contextlib
import json
import re
import shutil
import subprocess
import threading
import urllib.parse
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncsplit.telemetry.scrape import fetch

PATIENCE_S = 10.0
"""Seconds it may take to answer, or to end."""

# A shell stands between us, because it sees our end in any case: then its input is closed.
_GUARD = """\
exec 3<&0
"$@" </dev/null &
exec 2>/dev/null
read -r _ <&3
kill $!
wait $!
"""


def installed() -> str | None:
    """Return the program, or None if this machine has none."""
    return shutil.which("prometheus")


@contextlib.contextmanager
def running(program: str, config: Path, data: Path) -> Iterator["Api"]:
    """Run Prometheus with a configuration, on a free port of the loopback address.

    It has ended when this returns, and also ends if this process is killed.

    Raises:
        OSError: If it does not start; the message has what it said last.
    """
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        "--web.listen-address=127.0.0.1:0",
        "--enable-feature=exemplar-storage",
    ]
    with subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "sh", *command],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us, and we end it
    ) as guard:
        assert guard.stdin is not None
        assert guard.stderr is not None
        # It would stop one day, with nobody to read what it has to say.
        rest = threading.Thread(target=deque, args=(guard.stderr, 0), daemon=True)
        try:
            said: list[str] = []
            listening, ready = None, False
            for line in guard.stderr:
                said.append(line)
                # Either may come first.
                listening = listening or re.search(r'msg="Listening on".* address=(\S+)', line)
                ready = ready or "Server is ready" in line
                if listening and ready:
                    break
            if listening is None or not ready:
                raise OSError(f"{program} did not start: {''.join(said[-3:])}")
            rest.start()
            yield Api(f"http://{listening[1]}")
        finally:
            guard.stdin.close()
            guard.wait()
            if rest.is_alive():  # until it has read to the end, nobody may close what it reads
                rest.join()


class Api:
    """Asks a Prometheus."""

    def __init__(self, url: str) -> None:
        """Ask the one at an address."""
        self.url = url

    def call(self, path: str, **parameters: str) -> Any:
        """Return what it answers.

        Raises:
            OSError: If it does not.
        """
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        return json.loads(fetch(url, PATIENCE_S))["data"]

    def vector(self, promql: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and values of a query's results, now."""
        result = self.call("query", query=promql)["result"]
        return [(one["metric"], float(one["value"][1])) for one in result]
