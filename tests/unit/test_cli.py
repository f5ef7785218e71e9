import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from asyncsplit import __version__, cli


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Put a demo in place that records its arguments."""
    calls: list[list[str]] = []
    module = ModuleType(cli._COMMANDS["demo"][0])
    module.main = calls.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_module_runs_and_prints_the_installed_version() -> None:
    output = subprocess.check_output([sys.executable, "-m", "asyncsplit", "--version"], text=True)

    assert output == f"asyncsplit {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--workers", "3", "--version"], ["extra", "-x"]]
)
def test_command_gets_every_argument_that_follows_it(
    demo: list[list[str]], arguments: list[str]
) -> None:
    assert cli.main(["demo", *arguments]) == 0
    assert demo == [arguments]


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["--unknown", "demo"]])
def test_wrong_usage_exits_with_2_and_runs_nothing(
    demo: list[list[str]], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)

    assert exit_info.value.code == 2
    assert demo == []


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)

    said = capsys.readouterr()
    for command in cli._COMMANDS:
        assert f"\n  {command} " in (said.out if arguments else said.err)


def test_missing_extra_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "command_with_extra.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli._COMMANDS, "demo", ("command_with_extra", ""))

    assert cli.main(["demo"]) == 2
    assert "needs no_such_package: pip install 'asyncsplit[demo]'" in capsys.readouterr().err
