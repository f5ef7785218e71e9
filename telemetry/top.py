"""``asyncsplit top`` shows what split datasets do while they do it."""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import select
import signal
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from rich.console import Console
from rich.live import Live

from asyncsplit.telemetry import discovery
from asyncsplit.telemetry.present import SORT_KEYS, WINDOW_S
from asyncsplit.telemetry.scrape import scrape_all
from asyncsplit.telemetry.screen import Screen, Section
from asyncsplit.telemetry.watch import Watch

_Show: TypeAlias = Callable[[Sequence[Section]], None]
_QuitsWithin: TypeAlias = Callable[[float], bool]
"""Waits so many seconds, and tells whether the user wants to leave."""

INTERVAL_S = 2.0
TIMEOUT_S = 5.0
"""Seconds an endpoint may take to answer."""
PLAIN_WIDTH = 10_000
"""Nothing is cut off where nobody looks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Show split datasets: live in a terminal, and as plain text elsewhere.

    Returns:
        0 after as many updates as asked for, or the key q; 1 if there is nothing to show; 2 for
        wrong usage; 3 if what was shown has gone; 130 after Ctrl-C.
    """
    arguments = _parse(argv)
    try:
        return _Top(arguments).run()
    except KeyboardInterrupt:
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="asyncsplit top",
        description="Watch split datasets: who waits, for what, and how fast it goes.",
        epilog="In a terminal it is live, until q or Ctrl-C. Elsewhere it prints one snapshot, or"
        " one every --interval seconds. Exit status: 0 if all went well, 1 if there is nothing to"
        " show, 3 if what was shown has gone, 130 after Ctrl-C.",
    )
    parser.add_argument(
        "url",
        nargs="?",
        type=_url,
        metavar="URL",
        help="metrics of one coordinator, such as 127.0.0.1:9464 (default: all coordinators that"
        " this user has on this node)",
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        metavar="S",
        help=f"seconds between updates (default: {INTERVAL_S:g})",
    )
    parser.add_argument("--count", type=_count, metavar="N", help="end after so many updates")
    parser.add_argument(
        "--sort",
        choices=SORT_KEYS,
        default="split",
        help="order of the splits, the worst first (default: their numbers). Of more than 64 splits"
        " the worst eight are shown, by that key or else by stall",
    )
    parser.add_argument(
        "--discovery-dir",
        type=Path,
        metavar="DIR",
        help="where coordinators announce themselves (default: %(default)s)",
        default=discovery.default_directory(),
    )
    return parser.parse_args(argv)


def _url(text: str) -> str:
    url = text if "://" in text else f"http://{text}"
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        # A port that is none raises when it is asked for.
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url if parts.path.strip("/") else parts._replace(path="/metrics").geturl()
    raise argparse.ArgumentTypeError(
        f"{text!r} is no address of metrics: HOST:PORT, or http://HOST:PORT/metrics"
    )


def _interval(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(seconds := float(text)) and 0.1 <= seconds <= 3600:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


class _Top:
    """One run of the command."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._watch = Watch()
        terminal = sys.stdout.isatty()
        # Escape codes only where somebody looks, whatever FORCE_COLOR says.
        self._console = Console(force_terminal=terminal, width=None if terminal else PLAIN_WIDTH)
        self._live = terminal and not self._console.is_dumb_terminal
        once = arguments.interval is None and not self._live
        self._count: int | None = arguments.count or (1 if once else None)

    def run(self) -> int:
        sections = self._look()
        if not any(section.now for section in sections):
            return _fail(1, *(_problems(sections) or [self._nothing()]))
        before = sections
        with self._display() as (show, quits_within):
            for number in itertools.count(1):
                # Rates need two scrapes, but who looks on need not wait for the second.
                if number > 1 or not self._live:
                    if quits_within(self._arguments.interval or INTERVAL_S):
                        return 0
                    before, sections = sections, self._look()
                if not sections:
                    break
                show(sections)
                if number == self._count and not all(section.problem for section in sections):
                    return 0
                if number == self._count:
                    before = sections
                    break
        return _fail(3, *_problems(before))

    def _look(self) -> list[Section]:
        if (url := self._arguments.url) is not None:
            urls = [url]
        else:
            found = discovery.targets(self._arguments.discovery_dir)
            urls = [f"http://{target.address}/metrics" for target in found]
        self._watch.take(scrape_all(urls, TIMEOUT_S), time.monotonic(), time.strftime("%H:%M:%S"))
        return [
            Section(one.url, now, one.problem, one.warnings(now))
            for one in self._watch.coordinators
            for now in [one.present(self._arguments.sort)]
        ]

    @contextlib.contextmanager
    def _display(self) -> Iterator[tuple[_Show, _QuitsWithin]]:
        if not self._live:
            yield self._print, _sleep
            return
        last = Screen(())
        try:
            with (
                _ended_by_sigterm(),
                _keys() as quits_within,
                Live(console=self._console, screen=True) as live,
            ):

                def show(sections: Sequence[Section]) -> None:
                    nonlocal last
                    last = Screen(sections)
                    footer = (
                        f"{time.strftime('%H:%M:%S')}  rates are of the last {WINDOW_S:g} s"
                        "  q quits"
                    )
                    live.update(dataclasses.replace(last, footer=footer))

                yield show, quits_within
        finally:
            self._console.print(last)  # what was seen last remains

    def _print(self, sections: Sequence[Section]) -> None:
        self._console.print(time.strftime("%Y-%m-%d %H:%M:%S"), highlight=False)
        self._console.print(Screen(sections, fit=False))
        self._console.print()

    def _nothing(self) -> str:
        directory: Path = self._arguments.discovery_dir
        others = sorted(
            one
            for one in Path(tempfile.gettempdir()).glob("asyncsplit-*")
            if one != directory and discovery.targets(one)
        )
        return (
            f"no coordinator serves metrics on this node: {directory} names none. Start a job, or"
            " name its address, which `await split.metrics_url()` returns: asyncsplit top URL."
        ) + "".join(f" There are some elsewhere: --discovery-dir {one}." for one in others)


def _problems(sections: Sequence[Section]) -> list[str]:
    return [
        f"{'' if one.now is None else f'dataset {one.now.dataset!r} at '}{one.url}: {one.problem}"
        for one in sections
    ]


def _fail(status: int, *messages: str) -> int:
    for message in messages:
        print(f"asyncsplit top: {message}", file=sys.stderr)
    return status


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


@contextlib.contextmanager
def _keys() -> Iterator[_QuitsWithin]:
    """Read keys as they are pressed, if there is somebody to press them."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    keyboard = sys.stdin.fileno()

    def quits_within(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([keyboard], [], [], left)[0] and os.read(keyboard, 1) in (b"q", b""):
                return True
        return False

    usual = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield quits_within
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, usual)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process in a way that gives the terminal back."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    usual = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)
