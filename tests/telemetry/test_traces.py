"""Spans of real processes, at a real receiver; their waits, at a real Prometheus."""

import asyncio
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from ray.data import Dataset

import asyncsplit
from asyncsplit import AsyncDataIterator, SplitOptions, TelemetryConfig
from asyncsplit.telemetry import spans
from tests.integration.consume import eventually, read
from tests.telemetry.server import Api, scraping
from tests.unit.receiver import Receiver


class Sent(NamedTuple):
    """A span that has arrived, and who sent it."""

    process: str
    span: Span

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            one.key.removeprefix("asyncsplit."): getattr(
                one.value, str(one.value.WhichOneof("value"))
            )
            for one in self.span.attributes
        }


class Spans:
    """What a receiver has got, by span id."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.by_id: dict[bytes, Sent] = {}

    def named(self, name: str) -> list[Sent]:
        with contextlib.suppress(queue.Empty):
            while True:
                for resource in self._receiver.traces.get_nowait().resource_spans:
                    attributes = resource.resource.attributes
                    ids = {one.key: one.value.string_value for one in attributes}
                    process = ids.get("service.instance.id", "")
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            self.by_id[span.span_id] = Sent(process, span)
        return [sent for sent in self.by_id.values() if sent.span.name == name]

    def parent(self, sent: Sent) -> str:
        return self.by_id[sent.span.parent_span_id].span.name

    def trace_ids(self) -> set[bytes]:
        return {sent.span.trace_id for sent in self.by_id.values()}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with contextlib.closing(Receiver()) as receiver:
        yield receiver


@pytest.fixture
def server(tmp_path: Path, discovery: Path) -> Iterator[Api]:
    with scraping(discovery, tmp_path) as api:
        yield api


def slow() -> Dataset:
    def take_a_while(batch: Any) -> Any:
        time.sleep(2 * spans.LONG_S)
        return batch

    dataset = ray.data.range(160, override_num_blocks=8).map_batches(take_a_while, batch_size=None)
    dataset.context.execution_options.preserve_order = True
    dataset.set_name("flights")
    return dataset


@pytest.mark.asyncio
@pytest.mark.usefixtures("ray_cluster")
async def test_an_epoch_is_one_trace_of_driver_coordinator_and_workers(
    receiver: Receiver,
    server: Api,
    discovery: Path,
    start: Callable[[AsyncDataIterator], Any],
) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(receiver.traces_url)))
    telemetry = TelemetryConfig(
        discovery_dir=str(discovery), otlp_traces_endpoint=receiver.traces_url
    )
    with provider.get_tracer("user").start_as_current_span("train"):
        its = asyncsplit.streaming_split(slow(), 2, options=SplitOptions(telemetry=telemetry))
    await asyncio.to_thread(provider.shutdown)
    got = Spans(receiver)

    async def has(name: str, count: int) -> bool:
        return len(got.named(f"asyncsplit.{name}")) >= count

    # The worker of split 1 dies in the epoch, and is replaced.
    stays, dies = map(start, its)
    await asyncio.gather(*(reader.next.remote() for reader in (stays, dies)))
    ray.kill(dies)
    comes = start(its[1])
    await asyncio.gather(*(reader.rest.remote() for reader in (stays, comes)))
    # A loop that has ended has sent its spans, whatever happens to its process.
    assert await has("stream", 2)
    await eventually(lambda: has("epoch", 1))
    assert got.named("train")
    assert len(got.trace_ids()) == 1

    (epoch,) = got.named("asyncsplit.epoch")
    assert got.parent(epoch) == "train"
    assert epoch.attributes == {
        "dataset": "flights",
        "splits": 2,
        "epoch": 0,
        "outcome": "completed",
        "rows": 160,
    }
    (driver,) = got.named("train")
    streams = got.named("asyncsplit.stream")
    assert {one.attributes["split"] for one in streams} == {0, 1}
    processes = [driver.process, epoch.process, *(one.process for one in streams)]
    assert len(set(processes)) == 4
    parents = {"stream": "epoch", "barrier": "epoch", "executor_start": "epoch"}
    for name, parent in {**parents, "rejoin": "epoch", "wait": "stream"}.items():
        for sent in got.named(f"asyncsplit.{name}"):
            assert got.parent(sent) == f"asyncsplit.{parent}"
            inside = got.by_id[sent.span.parent_span_id].span
            assert sent.span.start_time_unix_nano <= sent.span.end_time_unix_nano
            assert sent.span.trace_id == inside.trace_id
    (rejoin,) = got.named("asyncsplit.rejoin")
    assert (rejoin.attributes["split"], rejoin.attributes["reason"]) == (1, "consumer_died")
    pulls = got.named("asyncsplit.pull")
    assert {one.process for one in pulls} == {epoch.process}
    # Those of the worker that died came from a stream that was never sent.
    owned = [one for one in pulls if one.span.parent_span_id in got.by_id]
    assert {got.parent(one) for one in owned} == {"asyncsplit.stream"}
    assert {one.span.status.code for one in got.by_id.values()} == {Status.STATUS_CODE_UNSET}

    # Prometheus finds the trace of a long wait.
    async def exemplars() -> bool:
        now = time.time()
        found = await asyncio.to_thread(
            server.call,
            "query_exemplars",
            query="asyncsplit_batch_wait_seconds_bucket",
            start=str(now - 600),
            end=str(now + 60),
        )
        labels = [one["labels"] for series in found for one in series["exemplars"]]
        waits = {sent.span.span_id.hex() for sent in got.named("asyncsplit.wait")}
        traces = {one.hex() for one in got.trace_ids()}
        return any(one["trace_id"] in traces and one["span_id"] in waits for one in labels)

    await eventually(exemplars)

    # The coordinator dies in the next epoch, which goes on.
    rest = [reader.rest.remote() for reader in (stays, comes)]

    async def delivers() -> bool:
        status = await its[0].status()
        return status.epoch == 1 and sum(status.committed_rows) > 0

    await eventually(delivers)
    os.kill((await its[0].status()).pid, signal.SIGKILL)
    await asyncio.gather(*rest)
    await eventually(lambda: has("epoch", 2))
    assert await has("stream", 4)
    rejoins = [one for one in got.named("asyncsplit.rejoin") if one is not rejoin]
    assert {one.attributes["reason"] for one in rejoins} == {"coordinator_restarted"}
    assert {got.parent(one) for one in rejoins} == {"asyncsplit.stream"}
    assert len(got.trace_ids()) == 1


@pytest.mark.asyncio
@pytest.mark.usefixtures("ray_cluster")
async def test_a_job_whose_receiver_is_not_there_goes_on_as_if_nothing_were() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    telemetry = TelemetryConfig(
        otlp_traces_endpoint=f"{url}/traces", otlp_endpoint=f"{url}/metrics", push_interval_s=0.05
    )
    options = SplitOptions(telemetry=telemetry)
    (it,) = asyncsplit.streaming_split(ray.data.range(160), 1, options=options)
    for _ in range(2):
        assert sorted(await read(it)) == list(range(160))
    assert await it.schema() is not None


@pytest.mark.deep
def test_it_works_with_rays_own_tracing_on(receiver: Receiver) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.telemetry.hooked"],
        env={**os.environ, "SPANS_TO": receiver.traces_url, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr
    got = Spans(receiver)
    (epoch,) = got.named("asyncsplit.epoch")
    assert got.parent(epoch) == "train"
    for stream in got.named("asyncsplit.stream"):
        # The loop's own span is Ray's of the call.
        assert got.parent(stream) == "Worker.train ray.remote_worker"
        assert stream.span.trace_id == epoch.span.trace_id
        (link,) = stream.span.links
        assert link.span_id == epoch.span.span_id
    assert len(got.named("asyncsplit.stream")) == 2
