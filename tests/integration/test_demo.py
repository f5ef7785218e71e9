import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from asyncsplit.demo import prometheus
from asyncsplit.telemetry.scrape import fetch

COMMAND = [sys.executable, "-m", "asyncsplit", "demo", "--rows", "20000", "--epochs", "2"]


def test_demo_ends_by_itself_in_plain_lines_with_every_row_seen_once() -> None:
    done = subprocess.run(
        COMMAND,
        capture_output=True,
        text=True,
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "80"},
        timeout=110,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert re.search(r"^metrics at http://127\.0\.0\.1:\d+/metrics ", done.stdout, re.M)
    assert re.search(
        r"^ok +exactly once: in every epoch 19,\d{3} of 19,\d{3} rows", done.stdout, re.M
    )
    assert re.search(r"^ok +the loss fell: 0\.\d+ -> 0\.\d+$", done.stdout, re.M)
    (rows,) = re.findall(r"([\d,]+) rows per epoch", done.stdout)
    served = re.search(r"^rows handed to training +([\d,]+) \(split 0\), \1 ", done.stdout, re.M)
    assert served
    assert number(served[1]) == number(rows) // 2 * 2


@pytest.mark.parametrize(
    "moment", ["starting Ray", pytest.param("metrics at", marks=pytest.mark.deep)]
)
def test_ctrl_c_ends_the_demo_and_all_of_its_ray_and_prometheus(moment: str) -> None:
    # With a Prometheus where there is one, and Ray still to be started or there.
    observed = ["--observed"] if prometheus.installed() and moment == "metrics at" else []
    with subprocess.Popen(
        [*COMMAND, *observed],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Prometheus at" if observed else moment):
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (130, "asyncsplit demo: interrupted\n")
    assert not survivors(process.pid, within_s=60)
    urls = re.findall(r"^Prometheus at (\S+) ", "".join(said), re.M)
    assert len(urls) == len(observed)
    for url in urls:
        with pytest.raises(OSError, match="refused"):
            fetch(url, timeout_s=10)


def number(text: str) -> int:
    return int(text.replace(",", ""))


def survivors(session: int, within_s: float) -> list[str]:
    """Return the command lines of a session's processes that do not end within some seconds."""
    alive = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError, FileNotFoundError):
            if os.getsid(int(entry.name)) == session:
                command = (entry / "cmdline").read_text().replace("\0", " ")
                process = os.pidfd_open(int(entry.name))
                # Not select.select: it takes no descriptor from 1024 on, and Ray has many.
                ending = select.poll()
                ending.register(process, select.POLLIN)
                if not ending.poll(within_s * 1000):
                    alive.append(command)
                os.close(process)
    return alive
