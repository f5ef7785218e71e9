"""The results as tables: ``python -m benchmarks.table`` prints them.

With ``--write`` they replace what stands between the markers in ``README.md`` and
``docs/performance.md``.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "results.json"
ROOT = FILE.parent.parent
PAGES = {ROOT / "README.md": "ratios", ROOT / "docs" / "performance.md": "tables"}
BEGIN, END = "<!-- made by benchmarks.table -->", "<!-- end of what is made -->"


def ratios(results: dict[str, Any]) -> str:
    """Return a short table: what both sides did, and how many times longer Ray's took."""
    lines = ["| Figure | Ray | asyncsplit | Ray / asyncsplit |", "|---|---|---|---|"]
    for result in results.values():
        for figure in result["figures"]:
            if figure["class"] != "same work" or figure["unit"] not in ("us", "ms", "s"):
                continue
            for ratio in figure["ratios"]:
                if (ratio["over"], ratio["under"]) == ("ray", "asyncsplit"):
                    medians = [
                        f"{_number(figure['summary'][side]['median'])} {figure['unit']}"
                        for side in ("ray", "asyncsplit")
                    ]
                    cells = [f"`{figure['name']}`", *medians, f"{ratio['ratio_of_medians']:.3g}"]
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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


def write(results: dict[str, Any], pages: dict[Path, str] = PAGES) -> None:
    """Put the tables where their markers are.

    Raises:
        ValueError: If a page has no markers.
    """
    made = {"ratios": ratios(results), "tables": tables(results)}
    for page, name in pages.items():
        text, found = re.subn(
            f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})",
            lambda _, name=name: f"\n{made[name]}\n\n",  # type: ignore[misc]
            page.read_text(),
            flags=re.DOTALL,
        )
        if found != 1:
            raise ValueError(f"{page} has {found} places between {BEGIN} and {END}, not one")
        page.write_text(text)


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=FILE, help="results.json")
    parser.add_argument("--write", action="store_true", help="into README and docs")
    arguments = parser.parse_args()
    results = json.loads(arguments.file.read_text())
    if arguments.write:
        write(results)
    else:
        print(f"{ratios(results)}\n\n{tables(results)}")


if __name__ == "__main__":
    main()
