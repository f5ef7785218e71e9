"""Run many simulations: ``python -m tests.simulation --seeds 5000``."""

import argparse
import gc
import sys
import time
import traceback

from tests.simulation.world import fakes_installed, simulate


def main() -> int:
    """Run the seeds, print what fails, and return how many have."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5000, help="how many to run")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--verbose", action="store_true", help="print what happens")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    options = parser.parse_args()
    failed, began, steps, redelivered, taken_over = 0, time.monotonic(), 0, 0, 0
    with fakes_installed():
        gc.disable()
        for seed in range(options.first, options.first + options.seeds):
            if seed % 50 == 0:
                gc.collect()
            try:
                world = simulate(seed, verbose=options.verbose)
            except Exception:
                failed += 1
                traceback.print_exc(limit=-3)
                print(f"--> --first {seed} --seeds 1 --verbose", file=sys.stderr)
                if not options.keep_going:
                    return failed
                continue
            steps += world.oracle.steps
            redelivered += world.oracle.redelivered
            taken_over += world.oracle.taken_over
    print(
        f"{options.seeds} seeds, {failed} failed, {steps} steps checked,"
        f" {taken_over} epochs taken over, {redelivered} rows delivered again,"
        f" {time.monotonic() - began:.0f} s"
    )
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
