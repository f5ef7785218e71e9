"""The iterator that travels: small, of one size, and measured where it is made."""

import asyncio
import copy
import pickle

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import cloudpickle
from ray.data import Dataset

import asyncsplit
from asyncsplit import AsyncDataIterator, SplitOptions, TelemetryConfig
from tests.integration.consume import read

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


async def scrape(url: str) -> dict[str, float]:
    from urllib.request import urlopen

    def fetch() -> str:
        with urlopen(url, timeout=10) as reply:
            return str(reply.read().decode())

    text = await asyncio.to_thread(fetch)
    return {
        sample.name + "".join(f",{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_its_size_does_not_depend_on_the_dataset() -> None:
    sizes = set()
    for blocks in (2, 20_000):
        ds = ray.data.range(20_000, override_num_blocks=blocks)
        sizes |= {
            len(cloudpickle.dumps(it)) for it in asyncsplit.streaming_split(ds, 2, equal=True)
        }
    assert len(sizes) == 1
    assert sizes.pop() < 4096


async def test_its_size_is_measured_where_it_is_pickled() -> None:
    ds = ray.data.range(10)
    ds.set_name("ten")
    (it,) = asyncsplit.streaming_split(ds, 1)
    copied = pickle.loads(cloudpickle.dumps(it))
    assert sorted(await read(copied)) == list(range(10))
    url = await it.metrics_url()
    assert url is not None
    assert url.startswith("http://127.0.0.1:")
    metrics = await scrape(url)
    (size,) = [v for k, v in metrics.items() if k.startswith("asyncsplit_iterator_size_bytes")]
    _, (packed,) = it.__reduce__()
    assert size == len(packed)


async def test_metrics_can_be_switched_off() -> None:
    options = SplitOptions(telemetry=TelemetryConfig(enabled=False))
    (it,) = asyncsplit.streaming_split(ray.data.range(10), 1, options=options)
    assert await it.metrics_url() is None
    assert len(await read(it)) == 10


async def test_stats_are_ray_datas_and_our_own() -> None:
    def dataset() -> Dataset:
        return ray.data.range(1000, override_num_blocks=4).map_batches(lambda batch: batch)

    (it,) = asyncsplit.streaming_split(dataset(), 1)
    await read(it)
    stats = await it.stats()
    assert "MapBatches" in stats
    assert "1000" in stats.replace(",", "")


async def test_copies_are_consumers_of_their_own() -> None:
    (it,) = asyncsplit.streaming_split(ray.data.range(10), 1)
    for other in (copy.copy(it), copy.deepcopy(it)):
        assert isinstance(other, AsyncDataIterator)
        assert other.split_index == it.split_index
        assert len(await read(other)) == 10
    assert repr(it) == "<AsyncDataIterator split=0 of 1>"
    assert "new" in repr(it.iter_batches())
