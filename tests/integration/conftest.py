"""Fixtures of the integration tests."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.integration.programs import Program

ROOT = Path(__file__).parents[2]


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
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.programs"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            bufsize=1,
        ) as programs,
    ):
        assert programs.stdin is not None
        assert programs.stdout is not None
        stdin, stdout = programs.stdin, programs.stdout

        def run(program: Program) -> str:
            before = log.stat().st_size
            print(json.dumps(program), file=stdin)
            if not select.select([stdout], [], [], 200)[0]:
                programs.kill()
            answer = stdout.readline()
            said = log.read_text()[before:]
            assert answer, f"{program.place} ended its process, or hung: {said}"
            printed, error = json.loads(answer)
            assert not error, error
            assert "Traceback" not in said, said
            return str(printed)

        yield run
