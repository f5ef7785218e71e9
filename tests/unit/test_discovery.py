import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry.discovery import Entry, Target, default_directory, targets
from asyncsplit.telemetry.endpoint import Endpoint
from asyncsplit.telemetry.state import CoordinatorState

ONE = Target("127.0.0.1:1", "flights", 2, 7)
OTHER = Target("127.0.0.1:2", "trains", 4, 8)

LIVE = f"""
import sys
from pathlib import Path
from asyncsplit.telemetry.discovery import Entry, Target
entry = Entry(Path(sys.argv[1]), Target(*{tuple(OTHER)!r}))
print("ready", flush=True)
sys.stdin.read()
"""


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_says_what_prometheus_needs(tmp_path: Path) -> None:
    entry = Entry(tmp_path / "new" / "dir", ONE)
    (path,) = (tmp_path / "new" / "dir").iterdir()
    assert path.stat().st_mode & 0o777 == 0o644
    (group,) = json.loads(path.read_text())
    entry.withdraw()
    assert group["targets"] == ["127.0.0.1:1"]
    assert group["labels"] == {
        "__meta_asyncsplit_dataset": "flights",
        "__meta_asyncsplit_splits": "2",
        "__meta_asyncsplit_pid": "7",
    }


def test_coordinators_come_and_go(tmp_path: Path) -> None:
    one = Entry(tmp_path, ONE)
    other = Entry(tmp_path, OTHER)
    assert targets(tmp_path) == [ONE, OTHER]
    one.withdraw()
    assert targets(tmp_path) == [OTHER]
    one.withdraw()
    other.withdraw()
    assert targets(tmp_path) == []
    assert files(tmp_path) == []


def test_the_file_of_who_was_killed_goes_away(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", LIVE, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert targets(tmp_path) == [OTHER]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert targets(tmp_path) == [], "at once, whether the file is there or not"
    while files(tmp_path):
        time.sleep(0.01)


def test_a_file_that_nobody_holds_is_not_believed_and_the_next_one_clears_up(
    tmp_path: Path,
) -> None:
    entry = Entry(tmp_path, OTHER)
    (tmp_path / "left.json").write_text(entry.path.read_text())
    assert targets(tmp_path) == [OTHER]
    entry.withdraw()
    assert targets(tmp_path) == []
    entry = Entry(tmp_path, ONE)
    assert targets(tmp_path) == [ONE]
    assert files(tmp_path) == [entry.path.name]
    entry.withdraw()


def test_what_others_have_put_there_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    junk = (tmp_path / "junk.json").open("w")
    with junk:
        junk.write('[{"targets": ["x:1"]}]')
        junk.flush()
        entry = Entry(tmp_path, ONE)
        assert targets(tmp_path) == [ONE]
        entry.withdraw()
    assert "notes.txt" in files(tmp_path)
    assert targets(tmp_path / "nowhere") == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_somebody_elses_default_directory_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    default_directory().mkdir()
    os.chown(default_directory(), 12345, 12345)
    with pytest.raises(PermissionError, match="another user"):
        Entry(default_directory(), ONE)


def serve(config: TelemetryConfig) -> Endpoint:
    endpoint = Endpoint.serve(CoordinatorState.of("id", 3, "flights"), config)
    assert endpoint is not None
    return endpoint


def test_an_endpoint_is_found_as_long_as_it_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    endpoint = serve(TelemetryConfig())
    (target,) = targets(default_directory())
    assert f"http://{target.address}/metrics" == endpoint.url
    assert target[1:] == ("flights", 3, os.getpid())
    endpoint.close()
    assert files(default_directory()) == []


def test_no_file_is_written_if_none_is_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    endpoint = serve(TelemetryConfig(discovery_dir=False))
    endpoint.close()
    assert files(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_one_warning_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    endpoint = serve(TelemetryConfig(discovery_dir=str(tmp_path / "file" / "dir")))
    endpoint.close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in ("'flights'", str(tmp_path), endpoint.url, "TelemetryConfig(discovery_dir=...)"):
        assert part in record.getMessage()
