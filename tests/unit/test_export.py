import json
import resource
from pathlib import Path

import pytest

from asyncsplit import cli
from asyncsplit.telemetry.discovery import default_directory

FILES = Path(__file__).parents[2] / "asyncsplit" / "dashboards"


def written(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_file_is_exported_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a" / "b"
    assert cli.main(["dashboards", "export", str(folder)]) == 0
    assert written(folder).keys() == written(FILES).keys()
    assert capsys.readouterr().out.split() == sorted(str(folder / name) for name in written(FILES))
    assert str(default_directory()) in written(folder)["prometheus/prometheus.yml"]


def test_links_and_discovery_are_those_asked_for(tmp_path: Path) -> None:
    options = [
        "--runbook-url",
        "https://wiki.example/run",
        "--discovery-dir",
        "/shared/coordinators",
    ]
    assert cli.main(["dashboards", "export", str(tmp_path), *options]) == 0
    files = written(tmp_path)
    assert '"/shared/coordinators/*.json"' in files["prometheus/prometheus.yml"]
    assert "/shared/coordinators:/shared/coordinators:ro" in files["compose.yaml"]
    assert "https://wiki.example/run#asyncsplitskewhigh" in files["prometheus/asyncsplit.rules.yml"]
    links = json.loads(files["grafana/asyncsplit-overview.json"])["links"]
    assert "https://wiki.example/run" in {link.get("url") for link in links}
    assert not [name for name, text in files.items() if "docs/runbook.md" in text]


def test_a_changed_file_is_kept_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dashboards", "export", str(tmp_path)]
    assert cli.main(command) == 0
    mine = tmp_path / "prometheus/prometheus.yml"
    mine.write_text("mine")
    (tmp_path / "runbook.md").unlink()
    assert cli.main(command) == 1
    assert f"{mine} would be overwritten. Name another folder, or say --force." in (
        capsys.readouterr().err
    )
    assert mine.read_text() == "mine"
    assert not (tmp_path / "runbook.md").exists(), "all files or none"
    assert cli.main([*command, "--force"]) == 0
    assert mine.read_text() != "mine"
    assert cli.main(command) == 0, "nothing has changed since"


@pytest.mark.parametrize("what", ["a file", "below a file", "not allowed, even to root"])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    folder = {"a file": file, "below a file": file / "folder"}.get(what, Path("/sys/asyncsplit"))
    assert cli.main(["dashboards", "export", str(folder)]) == 1
    error = capsys.readouterr().err
    assert f"cannot write to {folder}: " in error
    assert "Name a folder that you may write to" in error


def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dashboards", "export", str(tmp_path), "--force"]
    assert cli.main(command) == 0
    (mine := tmp_path / "compose.yaml").write_text("mine")
    before = written(tmp_path)
    _, most = usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, most))  # less than a dashboard takes
    try:
        assert cli.main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert f"cannot write to {tmp_path}: File too large. Name" in capsys.readouterr().err
    assert written(tmp_path) == before, "nor half a file more"
    assert mine.read_text() == "mine"
