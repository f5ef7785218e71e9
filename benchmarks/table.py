"""Print the results as the tables of ``docs/performance.md``: ``python -m benchmarks.table``."""

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "results.json"


def tables(results: dict[str, Any]) -> str:
    """Return one table of all figures, and one of the conditions."""
    lines = [
        "| Figure | Unit | asyncsplit | Ray | Ratio Ray / asyncsplit: medians (minima) | Beside it"
        " | Targets | Class |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results.values():
        lines += map(_row, result["figures"])
    lines += ["", "| Workload | Date | Load average | Seconds |", "|---|---|---|---|"]
    for name, result in results.items():
        run = result["conditions"]
        load = ", ".join(map(str, run["load_average"]))
        lines.append(f"| `{name}` | {run['date']} | {load} | {run['seconds']} |")
    return "\n".join(lines)


def _row(figure: dict[str, Any]) -> str:
    medians = {side: value["median"] for side, value in figure["summary"].items()}
    both = [r for r in figure["ratios"] if (r["over"], r["under"]) == ("ray", "asyncsplit")]
    ratio = f"{both[0]['ratio_of_medians']:.3g} ({both[0]['ratio_of_minima']:.3g})" if both else ""
    others = [
        f"{side}: {_number(median)}"
        for side, median in medians.items()
        if side not in ("asyncsplit", "ray")
    ]
    targets = [
        f"{r['target']}: {_verdict(r['met'])}"
        + ("" if r in both else f", {r['ratio_of_medians']:.3g} ({r['ratio_of_minima']:.3g})")
        for r in figure["ratios"]
        if r["target"]
    ]
    targets += [
        f"{limit['side']} under {limit['limit']:g}: {_verdict(limit['met'])}"
        for limit in figure["limits"]
    ]
    cells = [
        f"`{figure['name']}`",
        figure["unit"],
        _number(medians["asyncsplit"]) if "asyncsplit" in medians else "",
        _number(medians["ray"]) if "ray" in medians else "",
        ratio,
        "; ".join(others),
        "; ".join(targets),
        figure["class"],
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    print(tables(json.loads(file.read_text())))
