"""What promtool says of rules, alerts and configuration, as they are exported."""

import subprocess
from pathlib import Path

from asyncsplit.telemetry.export import export, files
from tests.telemetry.server import tool

RULES_TEST = Path(__file__).parent / "rules_test.yml"


def exported(folder: Path) -> Path:
    discovery = folder / "discovery"
    discovery.mkdir()
    export(folder, files("https://example.com/runbook", str(discovery)), force=False)
    return folder


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [tool("promtool"), *arguments], capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def test_promtool_finds_nothing_wrong_with_the_rules(tmp_path: Path) -> None:
    rules = exported(tmp_path) / "prometheus/asyncsplit.rules.yml"
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", "--lint-fatal", rules)


def test_promtool_finds_nothing_wrong_with_the_configuration(tmp_path: Path) -> None:
    output = promtool("check", "config", exported(tmp_path) / "prometheus/prometheus.yml")
    assert "1 rule files found" in output


def test_each_alert_fires_stays_quiet_and_resolves() -> None:
    assert "SUCCESS" in promtool("test", "rules", RULES_TEST)
