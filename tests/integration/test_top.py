"""`asyncsplit top` on a real coordinator: somebody is missing, everybody reads, and it is gone."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import asyncsplit
from asyncsplit import SplitOptions, TelemetryConfig
from asyncsplit.telemetry import top, watch
from tests.integration.consume import eventually


@pytest.mark.asyncio
@pytest.mark.usefixtures("ray_cluster")
async def test_a_job_is_watched_from_the_barrier_to_its_end(
    start: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watch, "PATIENCE_S", 0.5)
    monkeypatch.setattr(top, "TIMEOUT_S", 10.0)
    arguments = ["--discovery-dir", str(tmp_path), "--interval", "0.2"]

    async def shown(*more: str) -> list[list[str]]:
        assert await asyncio.to_thread(top.main, [*arguments, *more]) == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    async def states(*expected: str) -> bool:
        lines = await shown("--count", "1")
        table = [line for line in lines if line and line[0] in ("0", "1")]
        return [line[1] for line in table] == [*expected]

    dataset = ray.data.range(1_000)
    dataset.set_name("numbers")
    options = SplitOptions(telemetry=TelemetryConfig(discovery_dir=str(tmp_path)))
    splits = asyncsplit.streaming_split(dataset, 2, options=options)
    assert await splits[0].metrics_url()
    first, second = map(start, splits)
    waiting = first.next.remote()
    await eventually(lambda: states("waiting", "missing"), timeout_s=60)
    (barrier,) = [line for line in await shown("--count", "1") if line and line[0] == "barrier"]
    assert barrier[:7] == ["barrier", "waiting", "for", "1", "of", "2", "splits:"]

    assert await second.next.remote()
    assert await waiting
    await eventually(lambda: states("reading", "reading"), timeout_s=60)

    watching = asyncio.create_task(asyncio.to_thread(top.main, arguments))
    del splits
    for reader in (first, second):
        ray.kill(reader)
    assert await watching == 3
    assert "dataset 'numbers' at http://127.0.0.1:" in capsys.readouterr().err
