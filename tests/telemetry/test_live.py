"""A real job with faults, watched by a real Prometheus with the configuration that is exported."""

import asyncio
import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.data import Dataset

import asyncsplit
from asyncsplit import AsyncDataIterator, ExecutionActiveError, SplitOptions, TelemetryConfig
from asyncsplit.telemetry.export import export, files
from dashboards import rules
from tests.integration.consume import eventually, read_epoch
from tests.telemetry.server import Api, prometheus
from tests.telemetry.test_dashboards import SHOWN

VARIABLES = {
    "$__rate_interval": "1m",
    "$__range": "1h",
    "$job": "asyncsplit",
    "$dataset": "flights",
}


def impatient(config: Path, rule_file: Path) -> None:
    """Let Prometheus look twice a second, and alerts fire for waits of more than a second."""
    content = yaml.safe_load(config.read_text())
    content["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), "500ms")
    config.write_text(json.dumps(content))
    groups = yaml.safe_load(rule_file.read_text())
    for rule in groups["groups"][1]["rules"]:
        rule["for"] = "0s"
        rule["expr"] = rule["expr"].replace(f"> {rules.STUCK_S}", "> 1")
    rule_file.write_text(json.dumps(groups))


@pytest.fixture
def server(tmp_path: Path, discovery: Path) -> Iterator[Api]:
    folder = tmp_path / "exported"
    export(folder, files("https://example.com/runbook", str(discovery)), force=False)
    config = folder / "prometheus/prometheus.yml"
    impatient(config, config.with_name("asyncsplit.rules.yml"))
    with prometheus(config, tmp_path / "data") as api:
        yield api


def gated(gate: Path) -> Dataset:
    """Return a dataset that brings nothing before a file is there."""

    def wait(batch: Any) -> Any:
        while not gate.exists():
            time.sleep(0.01)
        return batch

    dataset = ray.data.range(400, override_num_blocks=8).map_batches(wait, batch_size=None)
    dataset.context.execution_options.preserve_order = True
    dataset.set_name("flights")
    return dataset


class Watch:
    """Notes which queries have had results and which alerts have fired, at any time."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.fired: dict[str, set[str]] = {}
        self.empty: dict[str, str] = {}
        for one in SHOWN:
            expr = str(one.target["expr"])
            for name, value in VARIABLES.items():
                expr = expr.replace(name, value)
            self.empty[expr] = f"{one.board}: {one.panel['title']} {one.target['refId']}"

    async def go_on(self) -> None:
        while True:
            await asyncio.to_thread(self._look)

    async def sees(self, alert: str, says: str = "") -> None:
        """Return once an alert has fired with a description that says something."""
        await eventually(lambda: self._fired(alert, says))

    async def _fired(self, alert: str, says: str) -> bool:
        return any(says in description for description in tuple(self.fired.get(alert, ())))

    def _look(self) -> None:
        for name, annotations in self._api.firing():
            self.fired.setdefault(name, set()).add(annotations["description"])
        for expr in tuple(self.empty):
            if any(map(math.isfinite, self._api.values(expr))):
                del self.empty[expr]
        time.sleep(0.1)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.asyncio
@pytest.mark.usefixtures("ray_cluster")
async def test_every_panel_has_data_and_every_alert_fires_for_its_reason(
    server: Api, discovery: Path, start: Callable[[AsyncDataIterator], Any], tmp_path: Path
) -> None:
    async def found(targets: int) -> bool:
        return len(await asyncio.to_thread(server.values, "up == 1")) == targets

    gate = tmp_path / "gate"
    options = SplitOptions(telemetry=TelemetryConfig(discovery_dir=str(discovery)))
    its = asyncsplit.streaming_split(gated(gate), 2, equal=True, options=options)
    await eventually(lambda: found(1))

    watch = Watch(server)
    watching = asyncio.create_task(watch.go_on())
    early: asyncio.Task[Any] | None = None
    try:
        ahead, victim = map(start, its)
        first = [reader.next.remote() for reader in (ahead, victim)]
        await watch.sees("AsyncSplitWaitStuck")
        with pytest.raises(ExecutionActiveError):
            await its[0].schema()
        await watch.sees("AsyncSplitGuardRejections")

        gate.touch()
        assert all([await batch for batch in first])
        for _ in range(12):
            assert await ahead.next.remote()
        await watch.sees("AsyncSplitDataStallHigh", says="due to: data.")
        await watch.sees("AsyncSplitSkewHigh")

        ray.kill(victim)
        await watch.sees("AsyncSplitConsumerSilent", says="of split 1 of")
        its[1]._world_size = 1 << 100_000  # which is pickled with it
        replacement = start(its[1])
        assert await replacement.next.remote()
        await watch.sees("AsyncSplitRedeliveries")
        await watch.sees("AsyncSplitIteratorGrown")
        rest = [reader.rest.remote() for reader in (ahead, replacement)]
        assert all([await rows for rows in rest])

        early = asyncio.create_task(read_epoch(its[:1]))
        await watch.sees("AsyncSplitBarrierStuck", says="64 splits: 1.")
        late = start(its[1])
        assert await late.next.remote()

        # On a busy machine a scrape may have taken too long before.
        watch.fired.pop("AsyncSplitTargetDown", None)
        with frozen((await its[0].status()).pid):
            await watch.sees("AsyncSplitTargetDown")
            await asyncio.sleep(3)  # is the fault: the timer, of once a second, is late by that
        await watch.sees("AsyncSplitLoopLagHigh")
        await late.rest.remote()
        await early

        assert watch.fired.keys() == {alert.name for alert in rules.ALERTS}
        await eventually(lambda: asyncio.sleep(0, not watch.empty))
    finally:
        for task in filter(None, (watching, early)):
            task.cancel()
        print("queries without data:", *watch.empty.values(), sep="\n")
        print("alerts that fired:", *watch.fired)
