"""A job's metrics among Ray's own, read from the agent of its node as a Prometheus would."""

import asyncio
import re
from collections import Counter
from importlib.util import find_spec

import pytest
import ray

import asyncsplit
from asyncsplit import SplitOptions, TelemetryConfig
from asyncsplit.telemetry.catalog import CATALOG, Metric
from asyncsplit.telemetry.scrape import Samples, fetch
from tests.integration.consume import eventually, read_epoch

ROWS = "ray_asyncsplit_rows_total"


def shown_as(metric: Metric) -> set[str]:
    if metric.kind == "histogram":
        return {f"ray_{metric.name}_sum_total", f"ray_{metric.name}_count_total"}
    return {f"ray_{metric.name}"}


@pytest.mark.asyncio
@pytest.mark.usefixtures("ray_cluster")
async def test_rays_agent_serves_what_a_job_has_counted() -> None:
    if find_spec("aiohttp_cors") is None:
        pytest.skip("ray[default] is not installed, which Ray's agent needs: make test-ray-metrics")
    (node,) = ray.nodes()
    agent = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    dataset = ray.data.range(200, override_num_blocks=4)
    dataset.set_name("flights")
    options = SplitOptions(telemetry=TelemetryConfig(ray_metrics=True, push_interval_s=0.2))
    its = asyncsplit.streaming_split(dataset, 2, equal=True, options=options)
    assert [len(ids) for ids in await read_epoch(its)] == [100, 100]
    text = ""

    async def has_counted_all() -> bool:
        nonlocal text
        text = await asyncio.to_thread(fetch, agent, 10)
        return Samples.parse(text).by("dataset", ROWS) == {"flights": 200}

    await eventually(has_counted_all, timeout_s=60)  # Ray's agent is told every ten seconds
    series = re.findall(r"^(ray_asyncsplit\w+)\{(.*)\} ", text, re.M)
    names = Counter(name for name, _ in series)
    gauges = [metric for metric in CATALOG if metric.kind == "gauge"]
    # A counter is there once it has counted something: Ray takes no zero.
    assert (
        {ROWS}.union(*map(shown_as, gauges)) <= names.keys() <= set().union(*map(shown_as, CATALOG))
    )
    assert max(names.values()) <= 7, "few enough for Ray's pipeline"
    assert not [labels for _, labels in series if 'split="' in labels]
