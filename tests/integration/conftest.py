"""Fixtures of the integration tests."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Return a function that plays one of `tests.integration.nodes`, on a cluster of its own."""
    log = tmp_path_factory.mktemp("nodes") / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            bufsize=1,
        ) as nodes,
    ):
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        stdin, stdout = nodes.stdin, nodes.stdout

        def play(name: str) -> Any:
            print(name, file=stdin)
            answer = stdout.readline()
            assert answer, log.read_text()
            return json.loads(answer)

        yield play
