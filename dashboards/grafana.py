"""Makes Grafana's JSON of a board."""

import json
from collections.abc import Callable
from string import ascii_uppercase
from urllib.parse import quote

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from asyncsplit.telemetry.catalog import CATALOG
from dashboards import rules
from dashboards.boards import Dashboard, Panel, Query

TAG = "asyncsplit"

_SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHT = 8
_RUNBOOK = {alert.name: alert.runbook_url for alert in rules.ALERTS}

_AnyPanel = timeseries.Panel | stat.Panel | table.Panel


def render(board: Dashboard) -> str:
    """Return the JSON of a dashboard, the same bytes for the same board."""
    made = (
        builder.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .readonly()
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
    )
    for variable in _variables():
        made.with_variable(variable)
    if board.has_traces:
        made.with_variable(builder.DatasourceVariable("traces").label("Traces").type("tempo"))
    for link in _links():
        made.link(link)
    number = 0
    for row in board.rows:
        number += 1
        made.with_row(builder.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            made.with_panel(_panel(board, panel).id(number))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _variables() -> list[builder.DatasourceVariable | builder.QueryVariable]:
    source = builder.DatasourceVariable("datasource").label("Data source").type("prometheus")
    return [
        source,
        _query_variable("job", "Job", "label_values(asyncsplit_splits, job)"),
        _query_variable(
            "dataset", "Dataset", 'label_values(asyncsplit_splits{job=~"$job"}, dataset)'
        ),
    ]


def _query_variable(name: str, label: str, query: str) -> builder.QueryVariable:
    return (
        builder.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(dashboard.VariableOption(selected=True, text="All", value="$__all"))
    )


def _links() -> list[builder.DashboardLink]:
    boards = (
        builder.DashboardLink("asyncsplit")
        .type(dashboard.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
    )
    to_page = dashboard.DashboardLinkType.LINK
    runbook = builder.DashboardLink("Runbook").type(to_page).url(rules.RUNBOOK)
    ray = builder.DashboardLink("Ray Data").type(to_page).url("/d/rayDataDashboard").keep_time(True)
    return [boards, runbook.target_blank(True), ray]


def _panel(board: Dashboard, panel: Panel) -> _AnyPanel:
    made = _OF_KIND[panel.kind](panel)
    made.title(panel.title).description(_description(board, panel)).datasource(_SOURCE)
    made.unit(panel.unit).span(panel.width).height(_HEIGHT).thresholds(_thresholds(panel))
    links = {} if panel.alert is None else {panel.alert: _RUNBOOK[panel.alert]}
    if panel.traces is not None:
        links["Traces"] = _search(panel.traces)
    if links:
        to_page = dashboard.DashboardLinkType.LINK
        made.links(
            [
                builder.DashboardLink(title).url(url).target_blank(True).type(to_page)
                for title, url in links.items()
            ]
        )
    for ref, query in zip(ascii_uppercase, panel.queries, strict=False):
        made.with_target(_target(panel, ref, query))
        if changes := _changes(panel, query):
            made.override_by_query(ref, changes)
    return made


def _description(board: Dashboard, panel: Panel) -> str:
    """Return how to read the panel, and what its metrics mean."""
    metrics = (
        f"- `{metric.name}`: {metric.help}"
        for metric in CATALOG
        if (metric.board, metric.panel) == (board.board, panel.title)
    )
    return "\n".join([panel.hint, "", *metrics]).strip()


def _search(traceql: str) -> str:
    """Return the address of a search for spans, in the time shown."""
    query = {"refId": "A", "queryType": "traceql", "query": traceql}
    time = {"from": "${__from}", "to": "${__to}"}
    panes = {"traces": {"datasource": "${traces}", "queries": [query], "range": time}}
    # Grafana puts in what it knows of these, if it can read them.
    address = quote(json.dumps(panes, separators=(",", ":")))
    for name in ("traces", "__from", "__to"):
        address = address.replace(quote(f"${{{name}}}"), f"${{{name}}}")
    return f"/explore?schemaVersion=1&panes={address}"


def _thresholds(panel: Panel) -> builder.ThresholdsConfig:
    colours = ("yellow", "red")[-len(panel.limits) :] if panel.limits else ()
    steps = [
        dashboard.Threshold(value=None, color="green"),
        *(
            dashboard.Threshold(value=float(limit), color=colour)
            for limit, colour in zip(panel.limits, colours, strict=True)
        ),
    ]
    return builder.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


def _target(panel: Panel, ref: str, query: Query) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(ref).expr(query.expr).legend_format(query.legend)
    if panel.kind == "table":
        return target.instant().format(PromQueryFormat.TABLE)
    if panel.kind == "stat":
        return target.instant()
    return target.range().exemplar(True) if query.exemplars else target.range()


def _changes(panel: Panel, query: Query) -> list[dashboard.DynamicConfigValue]:
    """Return what is different for one query of the panel."""
    changes = []
    if panel.kind == "table":
        changes.append(dashboard.DynamicConfigValue(id_val="displayName", value=query.legend))
    if query.unit is not None:
        changes.append(dashboard.DynamicConfigValue(id_val="unit", value=query.unit))
        if panel.kind == "timeseries":
            right = dashboard.DynamicConfigValue(id_val="custom.axisPlacement", value="right")
            changes.append(right)
    if query.one is not None:
        mapping = [{"type": "value", "options": {"1": {"text": query.one, "index": 0}}}]
        changes.append(dashboard.DynamicConfigValue(id_val="mappings", value=mapping))
    return changes


def _timeseries(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .min(0)
        .tooltip(
            common_builder.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
        .legend(
            common_builder.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
    )
    if panel.top is not None:
        made.max(panel.top)
    if panel.bars:
        made.draw_style(common.GraphDrawStyle.BARS).fill_opacity(60)
    if panel.stacked:
        made.fill_opacity(40)
    if panel.stacked or panel.bars:
        made.stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL))
    if panel.limits:
        dashed = common.GraphThresholdsStyleMode.DASHED
        made.thresholds_style(common_builder.GraphThresholdsStyleConfig().mode(dashed))
    return made


def _stat(panel: Panel) -> stat.Panel:
    last = common_builder.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        stat.Panel()
        .text_mode(common.BigValueTextMode.VALUE_AND_NAME)
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(common.BigValueColorMode.NONE)
        .reduce_options(last)
    )


def _table(panel: Panel) -> table.Panel:
    order = {"Time": True}
    worst = panel.queries[0].legend
    return (
        table.Panel()
        .with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            dashboard.DataTransformerConfig(
                id_val="organize", options={"excludeByName": order, "renameByName": {}}
            )
        )
        .sort_by([common_builder.TableSortByFieldState().display_name(worst).desc(True)])
    )


_OF_KIND: dict[str, Callable[[Panel], _AnyPanel]] = {
    "timeseries": _timeseries,
    "stat": _stat,
    "table": _table,
}
