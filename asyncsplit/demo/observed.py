"""The demo with a Prometheus beside it, which answers what training waited for."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit

from asyncsplit.demo import prometheus
from asyncsplit.telemetry.discovery import Entry, Target
from asyncsplit.telemetry.export import export, files
from asyncsplit.telemetry.verdict import verdict

INTERVAL_S = 1
"""Seconds between scrapes, and between evaluations of rules: the demo is over in seconds."""
PATIENCE_S = 30.0
"""Seconds that Prometheus may take to scrape and to evaluate."""

WAITED, STREAMED = "asyncsplit_wait_seconds_total", "asyncsplit_stream_seconds_total"
STALL = f"sum({WAITED}) / sum({STREAMED})"
BY_CAUSE = f"sum by (cause) (asyncsplit_stall_seconds_total) / scalar(sum({STREAMED}))"
BY_SPLIT = f"{WAITED} / {STREAMED}"
WORST = f"topk(1, {BY_SPLIT})"
BLOCKED = "sum by (blocked_on) (asyncsplit_pump_blocked_seconds_total)"
ALERTS = "count by (alertname, alertstate) (count_over_time(ALERTS[1h]))"

_WAITED_FOR = {
    "barrier": "start of an epoch",
    "data": "data",
    "transfer": "transfer",
    "conversion": "conversion into batches",
}


Vector: TypeAlias = list[tuple[dict[str, str], float]]
"""Labels and values."""


class Answer(NamedTuple):
    """What Prometheus says to a question."""

    question: str
    answer: str
    query: str
    """The PromQL that it comes from."""


class Observed:
    """A job that a Prometheus scrapes."""

    def __init__(self, api: prometheus.Api, directory: Path) -> None:
        """Observe with a Prometheus that looks for targets in a directory."""
        self._api = api
        self._directory = directory
        self._entry: Entry | None = None

    @property
    def url(self) -> str:
        """Where Prometheus is."""
        return self._api.url

    async def begin(self, url: str, splits: int) -> None:
        """Have a coordinator's metrics scraped, and return once they have been.

        Raises:
            TimeoutError: If they are not.
        """
        target = Target(urlsplit(url).netloc, "flights", splits, os.getpid())
        self._entry = Entry(self._directory, target)
        await self._until("asyncsplit_splits", 0.0)

    async def end(self) -> list[Answer]:
        """Return what Prometheus knows, once it has seen all there was until now.

        Raises:
            TimeoutError: If that does not come to be.
        """
        now = time.time()
        await self._until("asyncsplit_splits", now)
        # Alerts are evaluated after the rule, or once more before it is evaluated again.
        await self._until("job_dataset:asyncsplit_rows:rate5m", now + 2 * INTERVAL_S)
        return await asyncio.to_thread(self._answers)

    def close(self) -> None:
        """Withdraw what `begin` has announced."""
        if self._entry is not None:
            self._entry.withdraw()

    async def _until(self, series: str, later_than: float) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_at:
            found = await asyncio.to_thread(self._api.vector, f"timestamp({series})")
            if any(at > later_than for _, at in found):
                return
            await asyncio.sleep(INTERVAL_S / 5)
        raise TimeoutError(f"Prometheus at {self.url} has no new {series} after {PATIENCE_S:g} s")

    def _answers(self) -> list[Answer]:
        return answers({query: self._api.vector(query) for query in QUERIES})


QUERIES = (STALL, BY_CAUSE, BY_SPLIT, WORST, BLOCKED, ALERTS)


def answers(found: Mapping[str, Vector]) -> list[Answer]:
    """Put the results of `QUERIES` into words."""
    ((_, stall),) = found[STALL]
    ((worst, worst_stall),) = found[WORST]
    causes = {labels["cause"]: share for labels, share in found[BY_CAUSE]}
    by_split = {labels["split"]: share for labels, share in found[BY_SPLIT]}
    blocked = {labels["blocked_on"]: seconds for labels, seconds in found[BLOCKED]}
    alerts = {
        state: sorted(one["alertname"] for one, _ in found[ALERTS] if one["alertstate"] == state)
        for state in ("firing", "pending")
    }
    return [
        Answer("Was training waiting for data?", f"{stall:.0%} of its time", STALL),
        Answer(
            "On what?",
            ", ".join(f"{what} {causes[cause]:.1%}" for cause, what in _WAITED_FOR.items()),
            BY_CAUSE,
        ),
        Answer(
            "Each split?",
            ", ".join(f"split {split} {share:.1%}" for split, share in sorted(by_split.items())),
            BY_SPLIT,
        ),
        Answer("The worst?", f"split {worst['split']} with {worst_stall:.1%}", WORST),
        Answer(
            "What limits it?",
            f"{verdict(stall, causes, blocked)}; the pump was blocked on the dataset for"
            f" {blocked['dataset']:.1f} s, on consumers for {blocked['consumers']:.1f} s",
            BLOCKED,
        ),
        Answer("Which alerts fired?", ", ".join(alerts["firing"]) or "none", ALERTS),
        Answer(
            "Which alerts were pending?",
            ", ".join(one for one in alerts["pending"] if one not in alerts["firing"]) or "none",
            ALERTS,
        ),
    ]


@contextlib.contextmanager
def observing(program: str) -> Iterator[Observed]:
    """Run Prometheus with the exported rules and alerts, and without a trace when it is over.

    Raises:
        OSError: If it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="asyncsplit-demo-") as name:
        folder = Path(name)
        targets = folder / "targets"
        targets.mkdir()
        content = {
            path: text.replace("interval: 15s", f"interval: {INTERVAL_S}s")
            for path, text in files("runbook.md", str(targets)).items()
            if path.startswith("prometheus/")
        }
        export(folder, content, force=False)
        config = folder / "prometheus/prometheus.yml"
        with prometheus.running(program, config, folder / "data") as api:
            observed = Observed(api, targets)
            with contextlib.closing(observed):
                yield observed
