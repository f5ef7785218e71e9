"""Run workloads, write ``results.json``, draw ``results.png`` and put the tables into the docs."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import ray
import ray.data

from benchmarks.chart import draw
from benchmarks.harness import Bench, conditions
from benchmarks.table import write
from benchmarks.workloads import ALL

HERE = Path(__file__).parent


def main() -> None:
    """Run the workloads named on the command line, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(ALL)}")
    parser.add_argument("--quick", action="store_true", help="less data, fewer turns: 3 minutes")
    parser.add_argument(
        "--output", type=Path, help="folder of the results; with --quick build/benchmarks"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - ALL.keys():
        parser.error(f"no such workload: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    folder: Path = arguments.output or (
        HERE.parent / "build" / "benchmarks" if arguments.quick else HERE
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    # Workloads that are not run again keep their figures, with their own date and conditions.
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # By default workers give way to whatever else the machine does.
        _system_config={"worker_niceness": 0},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        bench = Bench(quick=arguments.quick)
        for name in arguments.names or ALL:
            before, began = conditions(quick=arguments.quick), perf_counter()
            figures = [figure.to_json() for figure in ALL[name](bench)]
            results[name] = {
                "command": f"python -m benchmarks {'--quick ' * arguments.quick}{name}",
                "conditions": {**before, "seconds": round(perf_counter() - began, 1)},
                "figures": figures,
            }
            ordered = {key: results[key] for key in ALL if key in results}
            file.write_text(json.dumps(ordered, indent=1) + "\n")
            _report(name, results[name])
    finally:
        ray.shutdown()
        draw(results, folder / "results.png")
    if folder == HERE:
        write(results)


def _report(name: str, result: dict[str, Any]) -> None:
    run = result["conditions"]
    print(f"\n{name}: {run['seconds']} s, load average {run['load_average'][0]}")
    for figure in result["figures"]:
        print(f"  {figure['name']}: {figure['what']} ({figure['class']})")
        for side, value in figure["summary"].items():
            low, median, high = (f"{value[key]:.5g}" for key in ("min", "median", "max"))
            print(f"    {side:24} {median:>9} {figure['unit']}   ({low} to {high})")
        for ratio in figure["ratios"]:
            verdict = {True: ", met", False: ", MISSED", None: ""}[ratio["met"]]
            target = f" (target: {ratio['target']}{verdict})" if ratio["target"] else ""
            factor = f"{ratio['ratio_of_medians']:.3g} (of minima {ratio['ratio_of_minima']:.3g})"
            print(f"    {ratio['over']} / {ratio['under']}: {factor}{target}")
        for limit in figure["limits"]:
            verdict = "met" if limit["met"] else "MISSED"
            print(f"    {limit['side']}: under {limit['limit']:g} {figure['unit']}, {verdict}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
