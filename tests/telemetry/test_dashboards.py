"""Dashboards and rules as files: up to date, in step with the catalogue, and as Grafana asks."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import promql_parser
import pytest
import yaml
from jsonschema import Draft7Validator

from asyncsplit.telemetry.catalog import CATALOG, Metric
from asyncsplit.telemetry.spans import SPANS
from dashboards import rules
from dashboards.boards import DASHBOARDS
from dashboards.build import FILES, ROOT, generated
from dashboards.promql import METRICS, Promql

SCHEMA = Path(__file__).parent / "grafana-dashboard-13.2.3.schema.json"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FILES.glob("grafana/*.json"))}
RULES_TEST = yaml.safe_load((Path(__file__).parent / "rules_test.yml").read_text())

# Grafana computes these; what they stand for here is told apart again in the parsed query.
RATE_INTERVAL_S, RANGE_S = 61, 3607
VARIABLES = {
    "$__rate_interval": f"{RATE_INTERVAL_S}s",
    "$__range": f"{RANGE_S}s",
    "$job": "THE JOB",
    "$dataset": "THE DATASET",
}
SERIES = {
    f"{metric.name}{suffix}": metric
    for metric in CATALOG
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}


class Shown(NamedTuple):
    """A query of a panel of a dashboard."""

    board: str
    panel: dict[str, Any]
    target: dict[str, Any]

    @property
    def expr(self) -> str:
        expr = str(self.target["expr"])
        for name, value in VARIABLES.items():
            expr = expr.replace(name, value)
        return expr


def panels_of(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


PANELS = [(uid, panel) for uid, board in BOARDS.items() for panel in panels_of(board)]
PANEL_IDS = [f"{uid}: {panel['title']}" for uid, panel in PANELS]
SHOWN = [Shown(uid, panel, target) for uid, panel in PANELS for target in panel["targets"]]
SHOWN_IDS = [f"{one.board}: {one.panel['title']} {one.target['refId']}" for one in SHOWN]


def nodes(expr: str) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(expr), found.append)
    return found


def selectors(expr: str) -> list[Any]:
    found = []
    for node in nodes(expr):
        if isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            found.append(node)
    assert found
    return found


def matchers(selector: Any) -> dict[str, str]:
    return {one.name: one.value for one in selector.matchers.matchers}


def test_generating_them_anew_changes_nothing() -> None:
    made = generated()
    kept = {name: (FILES / name).read_text() for name in made}
    changed = [name for name in made if kept[name] != made[name]]
    assert not changed, "run: python -m dashboards.build"
    assert {f"grafana/{uid}.json" for uid in BOARDS} == {
        name for name in made if name.startswith("grafana/")
    }


def test_the_package_does_not_need_what_builds_them() -> None:
    sources = [*(ROOT / "asyncsplit").rglob("*.py"), *(ROOT / "asyncsplit/telemetry").rglob("*.py")]
    assert not [
        source
        for source in sources
        if re.search(
            r"^\s*(import|from) (dashboards|grafana_foundation_sdk|yaml)", source.read_text(), re.M
        )
    ]


@pytest.mark.parametrize("metric", CATALOG, ids=lambda metric: metric.name)
def test_a_metric_is_shown_where_the_catalogue_says(metric: Metric) -> None:
    names = {name for name, of in SERIES.items() if of is metric}
    assert [
        one
        for one in SHOWN
        if (one.board, one.panel["title"]) == (f"asyncsplit-{metric.board}", metric.panel)
        and {selector.name for selector in selectors(one.expr)} & names
    ]


@pytest.mark.parametrize("one", SHOWN, ids=SHOWN_IDS)
def test_a_query_is_promql_about_our_metrics_of_the_job_and_dataset_chosen(one: Shown) -> None:
    assert "$" not in one.expr
    for selector in selectors(one.expr):
        metric = SERIES[selector.name]
        matched = matchers(selector)
        assert matched.keys() <= {"job", *metric.labels}
        assert matched["job"] == "THE JOB"
        # No matcher for the instance: coordinators of one dataset, of before and after a restart,
        # belong together.
        assert matched.get("dataset") == ("THE DATASET" if "dataset" in metric.labels else None)
    for label in re.findall(r"{{(\w+)}}", one.target.get("legendFormat", "")):
        assert re.search(rf"by \([^)]*\b{label}\b", one.expr), f"no result has the label {label}"


@pytest.mark.parametrize("one", SHOWN, ids=SHOWN_IDS)
def test_counters_are_shown_as_rates_over_grafanas_interval(one: Shown) -> None:
    grown = set()
    for node in nodes(one.expr):
        if isinstance(node, promql_parser.Call) and node.func.name in ("rate", "increase"):
            (matrix,) = node.args
            seconds = matrix.range.total_seconds()
            assert seconds == RATE_INTERVAL_S or (
                node.func.name == "increase" and seconds == RANGE_S
            )
            grown.add(matrix.vector_selector.name)
    for selector in selectors(one.expr):
        assert (SERIES[selector.name].kind != "gauge") == (selector.name in grown)


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=PANEL_IDS)
def test_a_panel_says_what_it_is(board: str, panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].partition("\n")[0].endswith(".")
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert not [target for target in panel["targets"] if "datasource" in target]
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"][0] == {"color": "green", "value": None}
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references) > 0
    for link in panel.get("links", ()):
        runbook = link["url"] in {alert.runbook_url for alert in rules.ALERTS}
        assert runbook or searched(link["url"]) in {span.name for span in SPANS}


def searched(address: str) -> str:
    """Return the name of the spans that a link to Explore looks for."""
    path, _, parameters = address.partition("?")
    assert path == "/explore"
    assert {"${traces}", "${__from}", "${__to}"} <= set(re.findall(r"\$\{\w+\}", address))
    (pane,) = json.loads(parse_qs(parameters)["panes"][0]).values()
    assert pane["datasource"] == "${traces}"
    (query,) = pane["queries"]
    (name,) = re.findall(r'name = "(.*?)"', query["query"])
    return str(name)


def test_the_wait_per_batch_leads_to_traces() -> None:
    (panel,) = (panel for _, panel in PANELS if panel["title"] == "Wait per batch")
    assert [target.get("exemplar", False) for target in panel["targets"]] == [False, True, False]
    (link,) = panel["links"]
    assert searched(link["url"]) == "asyncsplit.wait"
    (variable,) = (
        one
        for one in BOARDS["asyncsplit-overview"]["templating"]["list"]
        if one["name"] == "traces"
    )
    assert (variable["type"], variable["query"]) == ("datasource", "tempo")


@pytest.mark.parametrize("uid", BOARDS)
def test_a_dashboard_can_be_used_with_any_data_source_job_and_dataset(uid: str) -> None:
    board = BOARDS[uid]
    assert (board["uid"], board["schemaVersion"], board["editable"]) == (uid, 42, False)
    assert board["tags"] == ["asyncsplit"]
    source, *others = board["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        *("datasource", "datasource", "prometheus"),
    )
    assert [one["name"] for one in others if one["name"] != "traces"] == ["job", "dataset"]
    for one in others[:2]:
        assert one["datasource"]["uid"] == "${datasource}"
        assert (one["includeAll"], one["multi"], one["allValue"]) == (True, True, ".+")
        inside = re.fullmatch(r"label_values\((.*), (\w+)\)", one["query"])
        assert inside is not None
        assert inside[2] == one["name"]
        (selector,) = selectors(inside[1])
        assert selector.name in SERIES
    assert rules.RUNBOOK in {link.get("url") for link in board["links"]}


def test_the_uids_that_links_lead_to_stay() -> None:
    assert set(BOARDS) == {"asyncsplit-overview", "asyncsplit-coordinator", "asyncsplit-splits"}
    assert set(BOARDS) == {board.uid for board in DASHBOARDS}


@pytest.mark.parametrize("uid", BOARDS)
def test_panels_have_names_and_places_of_their_own(uid: str) -> None:
    panels = BOARDS[uid]["panels"]
    for what in ("id", "title"):
        assert len({panel[what] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


def errors(board: dict[str, Any]) -> list[str]:
    board = json.loads(json.dumps(board))
    for variable in board["templating"]["list"]:
        # Of another kind of variable; the SDK writes them for all.
        for key in ("auto", "auto_count", "auto_min"):
            variable.pop(key, None)
    schema = json.loads(SCHEMA.read_text())
    return [
        f"{error.json_path}: {error.message}"
        for error in Draft7Validator(schema).iter_errors(board)
    ]


@pytest.mark.parametrize("uid", BOARDS)
def test_a_dashboard_is_of_grafanas_type(uid: str) -> None:
    assert errors(BOARDS[uid]) == []


def test_grafanas_type_tells_mistakes() -> None:
    board = BOARDS["asyncsplit-overview"]
    assert errors({**board, "panls": []})
    assert errors({**board, "refresh": 123})
    first, second, *_ = board["panels"]
    assert errors({**board, "panels": [first, {**second, "gridPos": {"h": "tall"}}]})


def rule_expressions() -> Iterator[tuple[str, str]]:
    for record in rules.RECORDS:
        yield record.name, record.expr
    for alert in rules.ALERTS:
        yield alert.name, alert.expr
        for query in re.findall(r"printf `(.*?)`", alert.description):
            yield f"{alert.name} description", query.replace("%q", '"x"')


@pytest.mark.parametrize(("name", "expr"), [*rule_expressions()])
def test_rules_are_about_our_metrics(name: str, expr: str) -> None:
    recorded = {record.name for record in rules.RECORDS}
    for selector in selectors(expr):
        assert selector.name in {*SERIES, *recorded, "up"}


def test_recorded_names_say_level_metric_and_operation() -> None:
    for record in rules.RECORDS:
        level, _, _ = record.name.split(":")
        assert record.name.count(":") == 2
        first = promql_parser.parse(record.expr)
        assert first is not None
        (by,) = set(re.findall(r"by \(([^)]*)\)", record.expr))
        assert level == "_".join(label for label in by.split(", ") if label != "le")


@pytest.mark.parametrize("alert", rules.ALERTS, ids=lambda alert: alert.name)
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: rules.Alert) -> None:
    assert alert.name.startswith("AsyncSplit")
    assert alert.severity in ("critical", "warning", "info")
    assert alert.summary
    assert alert.description.endswith(".")


def test_each_alert_has_a_section_of_the_runbook_and_each_section_an_alert() -> None:
    text = (ROOT / rules.RUNBOOK).read_text()
    _, *sections = re.split(r"^## ", text, flags=re.M)
    names = [section.partition("\n")[0] for section in sections]
    assert names == [alert.name for alert in rules.ALERTS]
    for section in sections:
        assert re.findall(r"^\*\*(.*?)\.\*\*", section, re.M) == [
            *("What it means", "Confirm", "What to do"),
        ]
    for board, panel in re.findall(r"\*(Overview|Coordinator|Splits)\*, panels? \*(.*?)\*", text):
        titles = [one["title"] for one in panels_of(BOARDS[f"asyncsplit-{board.lower()}"])]
        assert panel in titles


def test_queries_of_the_runbook_are_among_those_that_promtool_tests() -> None:
    text = (ROOT / rules.RUNBOOK).read_text()
    queries = re.findall(r"^```promql\n(.*?)^```", text, re.M | re.S)
    tested = {
        one["expr"] for test in RULES_TEST["tests"] for one in test.get("promql_expr_test", ())
    }
    assert queries
    assert {" ".join(query.split()) for query in queries} <= tested


@pytest.mark.parametrize("alert", rules.ALERTS, ids=lambda alert: alert.name)
def test_promtools_tests_have_each_alert_quiet_firing_and_resolved(alert: rules.Alert) -> None:
    cases = [
        case
        for test in RULES_TEST["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert.name
    ]
    cases.sort(key=lambda case: int(case["eval_time"].removesuffix("m")))
    assert [bool(case["exp_alerts"]) for case in cases] == [False, True, False]


@pytest.mark.parametrize("path", sorted(FILES.rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_yaml_file_can_be_read(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_rules_for_kubernetes_are_the_same() -> None:
    resource = yaml.safe_load((FILES / "kuberay/prometheusrule.yaml").read_text())
    assert resource["spec"] == yaml.safe_load(
        (FILES / "prometheus/asyncsplit.rules.yml").read_text()
    )


def test_compose_mounts_what_the_export_writes() -> None:
    services = yaml.safe_load((FILES / "compose.yaml").read_text())["services"]
    for service in services.values():
        for mount in service["volumes"]:
            source = mount.partition(":")[0]
            assert source.startswith("/") or (FILES / source).exists()
    boards = {mount.partition(":")[0] for mount in services["grafana"]["volumes"]}
    assert boards >= {f"./grafana/{uid}.json" for uid in BOARDS}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("asyncsplit_no_such_total", Promql.rate),
        ("asyncsplit_skew_ratio", Promql.rate),
        ("asyncsplit_rows_total", Promql.gauge),
        ("asyncsplit_rows_total", Promql.mean),
    ],
)
def test_a_query_of_something_else_cannot_be_made(name: str, make: Any) -> None:
    with pytest.raises(ValueError if name in METRICS else KeyError, match=name):
        make(Promql(keep=(), window="5m"), name)


def test_a_query_with_a_label_the_metric_lacks_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="asyncsplit_skew_ratio has no label split"):
        Promql(keep=(), window="5m").gauge("asyncsplit_skew_ratio", "split")
