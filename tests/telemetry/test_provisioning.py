"""Files for people with Docker, as far as they can be checked without it and without Grafana."""

import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from jsonschema import Draft7Validator

from asyncsplit.demo import prometheus
from dashboards.build import FILES
from tests.telemetry.server import tool
from tests.telemetry.test_rules import exported

TEXT, YES_NO, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}


def only(required: list[str], **properties: object) -> dict[str, Any]:
    """Return the schema of an object that has no other keys: a misspelt one is found."""
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def some(**properties: object) -> dict[str, Any]:
    return {"type": "array", "items": only(["name"], **properties), "minItems": 1}


# Fields and types as in Grafana's documentation, "Provision Grafana" and "Configure the Prometheus
# data source", which has no schema of them. No secrets, and only the types that are used here.
PROVISIONING = {
    "dashboards/asyncsplit.yaml": only(
        ["apiVersion", "providers"],
        apiVersion={"const": 1},
        providers=some(
            name=TEXT,
            orgId=NUMBER,
            folder=TEXT,
            folderUid=TEXT,
            type={"const": "file"},
            disableDeletion=YES_NO,
            updateIntervalSeconds=NUMBER,
            allowUiUpdates=YES_NO,
            options=only(["path"], path=TEXT, foldersFromFilesStructure=YES_NO),
        ),
    ),
    "datasources/asyncsplit.yaml": only(
        ["apiVersion", "datasources"],
        apiVersion={"const": 1},
        prune=YES_NO,
        datasources=some(
            name=TEXT,
            type={"enum": ["prometheus", "tempo"]},
            access={"enum": ["proxy", "direct"]},
            orgId=NUMBER,
            uid={"type": "string", "pattern": "^[A-Za-z0-9_-]{1,40}$"},
            url={"type": "string", "pattern": "^http://"},
            isDefault=YES_NO,
            version=NUMBER,
            editable=YES_NO,
            jsonData=only(
                [],
                httpMethod={"enum": ["GET", "POST"]},
                manageAlerts=YES_NO,
                timeInterval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                queryTimeout=TEXT,
                prometheusType=TEXT,
                prometheusVersion=TEXT,
                cacheLevel={"enum": ["Low", "Medium", "High", "None"]},
                exemplarTraceIdDestinations=some(
                    name=TEXT, datasourceUid=TEXT, url=TEXT, urlDisplayLabel=TEXT
                ),
            ),
        ),
    ),
}


def read(name: str) -> Any:
    return yaml.safe_load((FILES / name).read_text())


SERVICES = read("compose.yaml")["services"]
PROMETHEUS, TEMPO = read("grafana/provisioning/datasources/asyncsplit.yaml")["datasources"]


def mounts(service: str) -> dict[str, str]:
    """Return what is mounted where, by the path in the container."""
    return {
        inside: outside
        for outside, inside, *_ in (each.split(":") for each in SERVICES[service]["volumes"])
    }


@pytest.mark.parametrize("name", PROVISIONING)
def test_provisioning_has_only_fields_that_grafana_documents(name: str) -> None:
    validator = Draft7Validator(PROVISIONING[name])
    content = read(f"grafana/provisioning/{name}")
    assert [error.message for error in validator.iter_errors(content)] == []
    (kind,) = content.keys() - {"apiVersion"}
    content[kind][0]["acess"] = "proxy"
    assert [*validator.iter_errors(content)], "a misspelt field is told"


def test_all_provisioning_is_checked() -> None:
    folder = FILES / "grafana/provisioning"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")} == {
        *PROVISIONING
    }


def test_grafana_finds_its_provisioning_and_the_dashboards_where_compose_mounts_them() -> None:
    inside = mounts("grafana")
    assert inside["/etc/grafana/provisioning"] == "./grafana/provisioning"
    (provider,) = read("grafana/provisioning/dashboards/asyncsplit.yaml")["providers"]
    boards = {path for path in inside if path.endswith(".json")}
    assert {str(Path(path).parent) for path in boards} == {provider["options"]["path"]}
    assert {Path(path).name for path in boards} == {
        path.name for path in FILES.glob("grafana/*.json")
    }


def test_grafana_asks_where_prometheus_and_tempo_listen() -> None:
    assert {service["network_mode"] for service in SERVICES.values()} == {"host"}
    (listens,) = (
        flag.partition("=")[2]
        for flag in SERVICES["prometheus"]["command"]
        if flag.startswith("--web.listen-address=")
    )
    assert urlsplit(PROMETHEUS["url"]).port == int(listens.rpartition(":")[2])
    tempo = read("tempo.yaml")
    assert urlsplit(TEMPO["url"]).port == tempo["server"]["http_listen_port"]
    spans = tempo["distributor"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert spans == "127.0.0.1:4318"
    assert mounts("tempo")["/etc/tempo.yaml"] == "./tempo.yaml"


def test_an_exemplar_leads_to_tempo() -> None:
    (destination,) = PROMETHEUS["jsonData"]["exemplarTraceIdDestinations"]
    assert destination == {"name": "trace_id", "datasourceUid": TEMPO["uid"]}


def test_grafana_knows_how_often_prometheus_scrapes() -> None:
    scraped = read("prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert PROMETHEUS["jsonData"]["timeInterval"] == scraped


def test_prometheus_starts_with_the_flags_and_the_configuration_of_compose(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    command = list(SERVICES["prometheus"]["command"])
    (config,) = [flag for flag in command if flag.startswith("--config.file=")]
    inside = Path(config.partition("=")[2])
    here = folder / mounts("prometheus")[str(inside.parent)] / inside.name
    (listen,) = [flag for flag in command if flag.startswith("--web.listen-address=")]
    others = [flag for flag in command if flag not in (config, listen)]
    assert "--enable-feature=exemplar-storage" in others
    script = tmp_path / "as-compose"
    script.write_text(
        f'#!/bin/sh\nexec {shlex.quote(tool("prometheus"))} {shlex.join(others)} "$@"\n'
    )
    script.chmod(0o755)
    with prometheus.running(str(script), here, tmp_path / "data") as api:
        groups = {group["name"] for group in api.call("rules")["groups"]}
        assert groups == {"asyncsplit.records", "asyncsplit.alerts"}
        assert re.search("job_name: asyncsplit", api.call("status/config")["yaml"])
