"""``python -m dashboards.preview`` draws the dashboards, without Grafana.

It runs `dashboards.job` with a Prometheus that looks on, for two minutes; or, given the address of
one, asks that. It runs the queries of the dashboards' JSON, and draws each panel with matplotlib
into ``dashboards/preview``. Layout, titles, units and thresholds are those of the JSON; how Grafana
would draw it is not known here.
"""

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from asyncsplit.demo import prometheus
from asyncsplit.telemetry.export import export, files
from dashboards.build import FILES

PREVIEW = Path(__file__).parent / "preview"

BEFORE_THE_END_S = 10.0
"""The previews end so long before the job does, or stats of the present would be empty."""

_STEPS = 120
_RED = "#c4162a"
_SMALL = 8
"""Size of ticks and legends, in points."""
_MOST_NAMES, _LONG = 12, 24
"""Names in a legend, and letters from which on two of them fill a line."""


class Series(NamedTuple):
    """One line of a panel."""

    name: str
    labels: dict[str, str]
    times: list[float]
    values: list[float]


class Source:
    """A Prometheus, and the time of which it is asked."""

    def __init__(self, url: str, end: float, seconds: float) -> None:
        """Ask of the seconds before ``end``, which is in seconds since 1970."""
        self.url = url
        self.start, self.end = end - seconds, end
        self._variables = {
            "$__rate_interval": "10s",
            "$__range": f"{math.ceil(seconds)}s",
            "$job": ".+",
            "$dataset": ".+",
        }

    def series(self, target: dict[str, Any]) -> Iterator[Series]:
        """Yield the results of a panel's query."""
        expr = target["expr"]
        for name, value in self._variables.items():
            expr = expr.replace(name, value)
        step = (self.end - self.start) / _STEPS
        parameters = {"query": expr, "start": self.start, "end": self.end, "step": step}
        address = f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(address, timeout=30) as response:
            results = json.load(response)["data"]["result"]
        for result in results:
            labels = result["metric"]
            times, values = zip(*result["values"], strict=True)
            yield Series(
                _named(target["legendFormat"], labels),
                labels,
                [moment - self.start for moment in times],
                [float(value) for value in values],
            )


def draw(board: dict[str, Any], source: Source) -> Figure:
    """Draw a dashboard."""
    places = [panel["gridPos"] for panel in board["panels"]]
    height = max(place["y"] + place["h"] for place in places)
    figure = Figure(figsize=(24 * 0.75, height * 0.42), facecolor="white")
    unit = 1 / height
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, top = place["x"] / 24, 1 - place["y"] * unit
        if panel["type"] == "row":
            figure.text(0.01, top - 0.7 * unit, panel["title"], weight="bold", size=13)
            continue
        pad = 0.012
        box = (
            left + 3.6 * pad,
            top - (place["h"] - 2.4) * unit,
            place["w"] / 24 - 6 * pad,
            (place["h"] - 3.8) * unit,
        )
        axes = figure.add_axes(box)
        axes.set_title(panel["title"], loc="left", size=11, weight="bold")
        _KINDS[panel["type"]](axes, panel, source)
    figure.text(
        0.99,
        1 - 0.6 * unit,
        f"{board['title']}: a preview drawn with matplotlib, not by Grafana",
        ha="right",
        size=10,
        color="#666666",
    )
    return figure


def _timeseries(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    found = [
        (series, _unit(panel, target["refId"]))
        for target in panel["targets"]
        for series in source.series(target)
    ]
    defaults = panel["fieldConfig"]["defaults"]
    # What has another unit is on the right.
    right = axes.twinx() if any(unit != defaults["unit"] for _, unit in found) else axes
    stacking = defaults["custom"].get("stacking", {}).get("mode") == "normal"
    base: dict[float, float] = {}
    for number, (series, unit) in enumerate(found):
        colour, values = f"C{number % 10}", series.values
        target = axes if unit == defaults["unit"] else right
        if stacking and target is axes:
            under = [base.get(moment, 0.0) for moment in series.times]
            values = [
                low + (value if math.isfinite(value) else 0)
                for low, value in zip(under, values, strict=True)
            ]
            target.fill_between(series.times, under, values, color=colour, alpha=0.3, lw=0)
            base |= dict(zip(series.times, values, strict=True))
        style = "-" if target is axes else ":"
        # A line of nothing would lie on the one below it in the stack, and hide its colour.
        if any(series.values) or not stacking:
            target.plot(series.times, values, style, color=colour, lw=1.2)
        axes.plot([], [], style, color=colour, label=series.name)
    axes.set_xlim(0, source.end - source.start)
    if found:
        axes.legend(
            *_first(axes, _MOST_NAMES),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.1),
            ncols=3 if max(len(series.name) for series, _ in found) < _LONG else 2,
            fontsize=_SMALL,
            handlelength=1.2,
            columnspacing=1.0,
            labelspacing=0.2,
            frameon=False,
        )
    else:
        axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center")
    _, high = axes.get_ylim()
    high = max(high, defaults.get("max", 0))
    for step in defaults["thresholds"]["steps"][1:]:
        if step["value"] <= high:
            axes.axhline(step["value"], color=_RED, ls="--", lw=0.8)
    axes.set_ylim(0, high)
    axes.yaxis.set_major_formatter(lambda value, _: _written(value, defaults["unit"]))
    if right is not axes:
        right.set_ylim(0, None)
        right.tick_params(labelsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)
    axes.grid(alpha=0.3)


def _stat(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    axes.set_axis_off()
    lines = [
        f"{series.name}: {_written(series.values[-1], _unit(panel, target['refId']))}"
        for target in panel["targets"]
        for series in source.series(target)
        # What was there only before is not drawn: a phase, say, that is over.
        if series.times[-1] >= source.end - source.start - 1
    ]
    text = "\n".join(textwrap.fill(line, 34) for line in lines)
    axes.text(0, 0.95, text, transform=axes.transAxes, va="top", size=9)


def _table(axes: Axes, panel: dict[str, Any], source: Source) -> None:
    axes.set_axis_off()
    titles = [target["legendFormat"] for target in panel["targets"]]
    rows: dict[tuple[str, str], list[str]] = {}
    for target in panel["targets"]:
        for series in source.series(target):
            row = rows.setdefault((series.labels["dataset"], series.labels["split"]), [])
            row.append(_written(series.values[-1], _unit(panel, target["refId"])))
    cells = [[*key, *row] for key, row in sorted(rows.items())]
    axes.table(
        cells,
        colLabels=["dataset", "split", *titles],
        loc="upper left",
        bbox=Bbox.from_bounds(0, 0.3, 1, 0.7),
    )


_KINDS = {"timeseries": _timeseries, "stat": _stat, "table": _table}


def _first(axes: Axes, count: int) -> tuple[list[Any], list[str]]:
    handles, names = axes.get_legend_handles_labels()
    return handles[:count], list(names[:count])


def _named(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)


def _unit(panel: dict[str, Any], ref: str) -> str:
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"] == {"id": "byFrameRefID", "options": ref}:
            for change in override["properties"]:
                if change["id"] == "unit":
                    return str(change["value"])
    return str(panel["fieldConfig"]["defaults"]["unit"])


def _written(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s" and 0 < value < 1:
        return f"{1000 * value:.3g} ms"
    if unit == "dateTimeFromNow":
        return time.strftime("%H:%M:%S UTC", time.gmtime(value / 1000))
    if unit in ("bytes", "Bps"):
        power = min(3, int(math.log(max(1, value), 1024)))
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}" + (
            "/s" if unit == "Bps" else ""
        )
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return number + {"s": " s", "rowsps": " rows/s", "ops": "/s"}.get(unit, "")


def write(source: Source) -> list[Path]:
    """Draw all dashboards into files; returns them."""
    PREVIEW.mkdir(exist_ok=True)
    written = []
    for path in sorted(FILES.glob("grafana/*.json")):
        figure = draw(json.loads(path.read_text()), source)
        target = PREVIEW / f"{path.stem}.png"
        # No date or version in it, so that the same picture is the same file.
        figure.savefig(target, dpi=80, metadata={"Software": None})
        written.append(target)
    return written


@contextlib.contextmanager
def recorded() -> Iterator[Source]:
    """Run the job with a Prometheus of our own; yields what that has seen, but for the end.

    Raises:
        OSError: If there is no Prometheus on this machine.
    """
    program = prometheus.installed()
    if program is None:
        raise OSError("there is no prometheus on the PATH: apt-get install prometheus")
    with tempfile.TemporaryDirectory(prefix="asyncsplit-preview-") as name:
        folder, found = Path(name), Path(name, "found")
        found.mkdir()
        content = {
            path: text.replace("interval: 15s", "interval: 1s")
            for path, text in files("runbook.md", str(found)).items()
            if path.startswith("prometheus/")
        }
        export(folder, content, force=False)
        config = folder / "prometheus/prometheus.yml"
        with prometheus.running(program, config, folder / "data") as api:
            subprocess.run([sys.executable, "-m", "dashboards.job", str(found)], check=True)
            scraped = "timestamp(asyncsplit_splits)[10m:1s]"
            ((_, first),) = api.vector(f"min_over_time({scraped})")
            ((_, last),) = api.vector(f"max_over_time({scraped})")
            yield Source(api.url, last - BEFORE_THE_END_S, last - BEFORE_THE_END_S - first)


def main() -> None:
    """Draw what a Prometheus has seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prometheus", nargs="?", help="such as http://localhost:9090")
    parser.add_argument("--seconds", type=float, default=120, help="default: %(default)s")
    parser.add_argument("--ago", type=float, default=0, help="seconds; default: now")
    args = parser.parse_args()
    source: contextlib.AbstractContextManager[Source] = recorded()
    if args.prometheus is not None:
        end = time.time() - args.ago
        source = contextlib.nullcontext(Source(args.prometheus, end, args.seconds))
    with source as seen:
        print(*write(seen), sep="\n")


if __name__ == "__main__":
    main()
