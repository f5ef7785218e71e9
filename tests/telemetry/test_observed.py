"""The demo with a real Prometheus beside it, and what remains of that Prometheus."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncsplit.demo.observed import (
    ALERTS,
    BLOCKED,
    BY_CAUSE,
    BY_SPLIT,
    STALL,
    WORST,
    Vector,
    answers,
    observing,
)
from asyncsplit.demo.prometheus import running
from tests.telemetry.server import get, tool

COMMAND = [sys.executable, "-m", "asyncsplit", "demo", "--rows", "20000", "--epochs", "2"]


def refuses(url: str) -> bool:
    try:
        get(url)
    except OSError:
        return True
    return False


def test_the_answers_say_what_the_queries_found() -> None:
    found: dict[str, Vector] = {
        STALL: [({}, 0.3)],
        BY_CAUSE: [
            ({"cause": "barrier"}, 0.05),
            ({"cause": "data"}, 0.2),
            ({"cause": "transfer"}, 0.0),
            ({"cause": "conversion"}, 0.05),
        ],
        BY_SPLIT: [({"split": "1"}, 0.4), ({"split": "0"}, 0.2)],
        WORST: [({"split": "1"}, 0.4)],
        BLOCKED: [({"blocked_on": "dataset"}, 9.0), ({"blocked_on": "consumers"}, 1.0)],
        ALERTS: [
            ({"alertname": "A", "alertstate": "firing"}, 1),
            ({"alertname": "A", "alertstate": "pending"}, 1),
            ({"alertname": "B", "alertstate": "pending"}, 1),
        ],
    }
    assert [(answer, query) for _, answer, query in answers(found)] == [
        ("30% of its time", STALL),
        (
            "start of an epoch 5.0%, data 20.0%, transfer 0.0%, conversion into batches 5.0%",
            BY_CAUSE,
        ),
        ("split 0 20.0%, split 1 40.0%", BY_SPLIT),
        ("split 1 with 40.0%", WORST),
        (
            "the dataset: it is too slow; the pump was blocked on the dataset for 9.0 s, on"
            " consumers for 1.0 s",
            BLOCKED,
        ),
        ("A", ALERTS),
        ("B", ALERTS),
    ]


@pytest.mark.deep
def test_prometheus_answers_what_training_waited_for_and_is_gone_after_that() -> None:
    tool("prometheus")
    done = subprocess.run([*COMMAND, "--observed"], capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    (url,) = re.findall(r"^Prometheus at (\S+) ", done.stdout, re.M)
    said = dict(re.findall(r"^(\S.*\?) +(.+)$", done.stdout, re.M))
    assert re.fullmatch(r"\d+% of its time", said["Was training waiting for data?"])
    assert re.fullmatch(
        r"start of an epoch [\d.]+%, data [\d.]+%, transfer [\d.]+%, conversion into.* [\d.]+%",
        said["On what?"],
    )
    assert re.fullmatch(r"split 0 [\d.]+%, split 1 [\d.]+%", said["Each split?"])
    # The demo asks for the schema in the middle of an epoch.
    assert "AsyncSplitGuardRejections" in said["Which alerts fired?"]
    assert refuses(url)


def test_a_prometheus_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with observing(tool("prometheus")) as observed:
        rules = observed._api.call("rules")["groups"]
        assert {group["name"] for group in rules} == {"asyncsplit.records", "asyncsplit.alerts"}
    assert refuses(observed.url)
    assert not list(tmp_path.iterdir())


def test_a_prometheus_ends_with_who_started_it_even_if_that_is_killed(tmp_path: Path) -> None:
    tool("prometheus")
    program = (
        "import sys, time\n"
        "from asyncsplit.demo.observed import observing\n"
        "with observing('prometheus') as observed:\n"
        "    print(observed.url, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert not refuses(f"{url}/-/healthy")
        process.kill()
    while not refuses(url):  # the test's timeout is the bound
        time.sleep(0.05)


def test_a_prometheus_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text("nonsense")
    with (
        pytest.raises(OSError, match=r"did not start: (.|\n)*prometheus\.yml"),
        running(tool("prometheus"), tmp_path / "prometheus.yml", tmp_path / "data"),
    ):
        pass
