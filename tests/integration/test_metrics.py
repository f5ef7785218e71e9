"""What a scrape shows of a job that is stuck, while it is."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray

import asyncsplit
from asyncsplit import AsyncDataIterator, SplitOptions, TelemetryConfig
from asyncsplit.telemetry.catalog import WORST
from asyncsplit.telemetry.discovery import targets
from asyncsplit.telemetry.ray_metrics import Bridge
from asyncsplit.telemetry.scrape import Samples
from asyncsplit.telemetry.state import CoordinatorState
from tests.integration.consume import Reader, eventually, read

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


class Stuck(Reader):
    """A consumer whose event loop comes to a stop."""

    async def get_stuck(self) -> None:
        time.sleep(3600)  # noqa: ASYNC251 - that is what is wrong with it


def get(url: str) -> str:
    with urlopen(url, timeout=60) as reply:
        return str(reply.read().decode())


class Scraper:
    """Reads the metrics of a job as Prometheus does."""

    def __init__(self, it: AsyncDataIterator) -> None:
        self._it = it
        self._url: str | None = None

    async def value(self, name: str, **labels: str) -> float:
        if self._url is None:
            self._url = await self._it.metrics_url()
        url = self._url
        assert url is not None

        text = await asyncio.to_thread(get, url)
        return Samples.parse(text).total(f"asyncsplit_{name}", **labels)

    async def until(self, holds: Callable[[float], bool], name: str, **labels: str) -> float:
        """Ask until it holds, and return the value."""
        value = 0.0

        async def settled() -> bool:
            nonlocal value
            value = await self.value(name, **labels)
            return holds(value)

        await eventually(settled)
        return value

    async def grows(self, name: str, **labels: str) -> None:
        """Return when a value has grown from one scrape to another."""
        first = await self.until(lambda value: value > 0, name, **labels)
        await self.until(lambda value: value > first, name, **labels)


def split_of(blocks: int, n: int, **options: Any) -> list[AsyncDataIterator]:
    ds = ray.data.range(100 * blocks, override_num_blocks=blocks)
    return asyncsplit.streaming_split(ds, n, equal=True, options=SplitOptions(**options))


async def test_the_age_of_a_stuck_consumers_last_batch_grows_while_it_is_stuck() -> None:
    its = split_of(8, 2)
    stuck: Any = ray.remote(Stuck).options(num_cpus=0).remote(its[1])
    scraper = Scraper(its[0])
    try:
        mine = its[0].iter_batches(batch_size=10)
        await asyncio.gather(anext(mine), stuck.next.remote())
        stuck.get_stuck.remote()
        async for _ in mine:
            pass
        for metric in ("split_batch_age_seconds", "split_silence_seconds", "epoch_age_seconds"):
            await scraper.grows(metric, **({"split": "1"} if "split" in metric else {}))
        assert await scraper.value("split_batch_age_seconds", split="0") == 0, "it has finished"
        assert await scraper.value("split_dead") == 0
        assert await scraper.value("split_behind_rows", split="1") > 0
    finally:
        ray.kill(stuck)
    await scraper.until(lambda dead: dead == 1, "split_dead", split="1")
    await scraper.grows("split_batch_age_seconds", split="1")
    async with its[1].iter_batches(batch_size=10) as replacement:
        await anext(replacement)
        await scraper.until(lambda n: n == 1, "rejoins_total", reason="consumer_died")
        assert await scraper.value("split_dead") == 0
        assert await scraper.value("consumer_deaths_total") == 1
        await scraper.until(lambda rows: rows > 0, "redelivered_rows_total")


async def test_who_is_missing_at_the_barrier_shows_while_others_wait() -> None:
    its = split_of(2, 3)
    scraper = Scraper(its[0])
    waiting = asyncio.create_task(anext(its[0].iter_batches()))
    await scraper.until(lambda missing: missing == 2, "barrier_missing_splits")
    shown = [await scraper.value("split_missing", split=str(split)) for split in range(3)]
    assert shown == [0, 1, 1]
    await scraper.grows("wait_age_seconds", wait="barrier")
    await scraper.grows("split_wait_age_seconds", split="0")
    await scraper.grows("split_silence_seconds", split="2")
    waiting.cancel()


async def test_where_the_time_of_training_goes_is_told_apart() -> None:
    its = split_of(4, 2)
    scraper = Scraper(its[0])

    async def train(it: AsyncDataIterator) -> None:
        async for _ in it.iter_batches(batch_size=10):
            await asyncio.sleep(0.001)

    await asyncio.gather(*map(train, its))
    await scraper.until(lambda epochs: epochs == 1, "epochs_total", outcome="completed")
    assert await scraper.value("batches_total") == 40
    assert await scraper.value("first_batch_seconds_count") == 2
    stalled = await scraper.value("wait_seconds_total")
    trained = await scraper.value("training_seconds_total")
    assert stalled + trained == pytest.approx(await scraper.value("stream_seconds_total"))
    assert await scraper.value("stall_seconds_total") == pytest.approx(stalled)
    assert await scraper.value("stall_seconds_total", cause="barrier") > 0
    assert await scraper.value("batch_wait_seconds_sum") == pytest.approx(stalled)
    # The end of a stream is waited for, too, if it was not known with the last block.
    assert 40 <= await scraper.value("batch_wait_seconds_count") <= 42
    assert await scraper.value("pump_blocked_seconds_total", blocked_on="dataset") > 0
    assert await scraper.value("executor_start_seconds_count") == 1
    assert await scraper.value("barrier_arrivals_total") == 2
    assert await scraper.value("barrier_wait_seconds_count") == 1
    assert await scraper.value("guard_locks_total") >= 1


async def test_a_scrape_of_a_thousand_splits_that_is_held_holds_nobody_up(tmp_path: Path) -> None:
    its = split_of(2, 1_024)
    url = await its[0].metrics_url()
    assert url is not None
    began, may_go_on = tmp_path / "began", tmp_path / "may go on"

    def hold(coordinator: Any) -> None:
        """Keep whoever asks for the ledger, as each scrape does."""
        distribution = coordinator._state.distribution

        def held() -> Any:
            began.touch()
            while not may_go_on.exists():
                time.sleep(0.01)
            return distribution()

        coordinator._state.distribution = held

    coordinator: Any = its[0]._consumer.coordinator
    await coordinator.__ray_call__.remote(hold)
    scrape = asyncio.create_task(asyncio.to_thread(get, url))
    try:
        await eventually(lambda: asyncio.to_thread(began.exists))
        for _ in range(10):
            assert (await its[0].status()).phase == "waiting"
        assert not scrape.done()
    finally:
        may_go_on.touch()
    samples = Samples.parse(await scrape)
    assert samples.total("asyncsplit_splits") == 1_024
    assert samples.by("split", "asyncsplit_rows_total").keys() == {""}
    assert len(samples.by("split", "asyncsplit_split_silence_seconds")) == WORST


async def test_a_ray_that_exports_no_metrics_says_what_is_missing() -> None:
    if any(node["MetricsExportPort"] > 0 for node in ray.nodes()):
        pytest.skip("this Ray exports metrics: ray[default] is installed")
    with pytest.raises(RuntimeError, match=r"pip install 'ray\[default\]'"):
        Bridge(CoordinatorState.of("id", 1))


async def test_a_ray_that_exports_no_metrics_does_not_keep_a_job_from_running() -> None:
    telemetry = TelemetryConfig(ray_metrics=True, push_interval_s=0.01)
    (it,) = split_of(1, 1, telemetry=telemetry)
    assert len(await read(it)) == 100


@pytest.mark.parametrize("end", ["dropped", "SIGKILL"])
async def test_a_coordinator_that_has_ended_is_not_found(end: str, tmp_path: Path) -> None:
    telemetry = TelemetryConfig(discovery_dir=str(tmp_path))
    its = split_of(2, 1, telemetry=telemetry, coordinator_max_restarts=0)
    url = await its[0].metrics_url()
    (target,) = await asyncio.to_thread(targets, tmp_path)
    assert f"http://{target.address}/metrics" == url
    if end == "SIGKILL":
        os.kill(target.pid, signal.SIGKILL)
    else:
        its.clear()

    async def gone() -> bool:
        return not await asyncio.to_thread(os.listdir, tmp_path)

    await eventually(gone)
