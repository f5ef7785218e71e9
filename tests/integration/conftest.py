"""Fixtures of the integration tests."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.integration.programs import Program

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def answering(module: str, log: Path, **options: Any) -> Iterator[Callable[[str], str]]:
    """Start a module that answers each line of its input by one, and yield what asks it.

    An empty answer says that the process has ended, or took over 200 s and was killed. What it says
    else is in ``log``.
    """
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            bufsize=1,
            **options,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(line: str) -> str:
            print(line, file=stdin)
            late = threading.Timer(200, process.kill)
            late.start()
            try:
                return str(stdout.readline())
            finally:
                late.cancel()

        yield ask


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Return a function that plays one of `tests.integration.nodes`, on a cluster of its own."""
    log = tmp_path_factory.mktemp("nodes") / "log"
    with answering("tests.integration.nodes", log) as ask:

        def play(name: str) -> Any:
            answer = ask(name)
            assert answer, log.read_text()
            return json.loads(answer)

        yield play


@pytest.fixture(scope="module")
def run(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Program], str]]:
    """Return a function that runs a program, in one process with the others of the module.

    It returns what the program prints, and fails where that raises or Ray tells of an error.
    """
    log = tmp_path_factory.mktemp("programs") / "log"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_LOG_TO_DRIVER": "0",
        # By default a group that has ended, or failed, is not looked at for up to 2 s.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    with answering("tests.integration.programs", log, cwd=ROOT, env=environment) as ask:

        def run(program: Program) -> str:
            before = log.stat().st_size
            answer = ask(json.dumps(program))
            said = log.read_text()[before:]
            assert answer, f"{program.place} ended its process, or hung: {said}"
            printed, error = json.loads(answer)
            assert not error, error
            assert "Traceback" not in said, said
            return str(printed)

        yield run
