"""Kill processes of a real job, one after the other: ``python -m tests.chaos --kills 200``."""

import argparse
import asyncio
import logging
import os
import sys
import time

import ray

from tests.chaos.kills import Chaos


def main() -> int:
    """Run until all kills of the plan are done, and print what came of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--equal", action="store_true")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)

    try:
        chaos = Chaos(options.splits, options.equal, options.seed, options.kills, say)
        say(str(asyncio.run(chaos.run())))
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
