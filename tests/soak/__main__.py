"""Run many epochs on one coordinator and see what grows: ``python -m tests.soak --epochs 1000``."""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import ray
import ray.data

from tests.soak.chart import draw
from tests.soak.measure import growth
from tests.soak.soak import Soak


def main() -> int:
    """Run, write and draw the series, and return 1 if something has grown too much."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--epochs", type=int, default=1000, help="30 or more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build"), help="folder of the results")
    options = parser.parse_args()
    if options.epochs < 30:
        parser.error(f"--epochs {options.epochs} is too few to see anything grow: 30 or more")
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)

    soak = Soak(options.epochs, options.seed, say=say)
    try:
        asyncio.run(soak.run())
    finally:
        ray.shutdown()
    verdicts = list(growth(soak.samples))
    (options.output / "soak.json").write_text(
        json.dumps(
            {
                "epochs": options.epochs,
                "seed": options.seed,
                "ray": ray.__version__,
                "kills": soak.kills,
                "whole_epochs": soak.whole,
                "verdicts": [it._asdict() for it in verdicts],
                "samples": [asdict(sample) for sample in soak.samples],
            },
            indent=1,
        )
    )
    draw(soak.samples, options.output / "soak.png")
    say(
        f"{soak.epochs} epochs, {soak.whole} read whole by all, {soak.kills} consumers killed and"
        f" replaced, {soak.redelivered_rows} rows delivered again: each row exactly once"
    )
    for it in verdicts:
        verdict = "GROWS" if it.excessive else "allowed"
        print(f"  {it.figure:26} {it.early:9.2f} -> {it.late:9.2f} of {it.allowed:9.2f}  {verdict}")
    return int(any(it.excessive for it in verdicts))


if __name__ == "__main__":
    sys.exit(main())
