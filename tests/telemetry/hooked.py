"""A job under Ray's own tracing: ``python -m tests.telemetry.hooked`` sends spans to SPANS_TO."""

import os
from typing import Any

import ray
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

import asyncsplit
from asyncsplit import AsyncDataIterator, SplitOptions, TelemetryConfig


def start_tracing() -> None:
    """Give each of Ray's processes a provider of its own, as a user's hook does."""
    provider = TracerProvider(shutdown_on_exit=False)
    exporter = OTLPSpanExporter(os.environ["SPANS_TO"])
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


class Worker:
    """Trains on one split."""

    def __init__(self, it: AsyncDataIterator) -> None:
        """Begin."""
        self._it = it

    async def train(self) -> int:
        """Return how many rows there were."""
        rows = 0
        async for batch in self._it.iter_batches(batch_size=50):
            rows += len(batch["id"])
        return rows


def main() -> None:
    """Read an epoch with two workers, and ask for the schema."""
    hook = f"{__spec__.name}:{start_tracing.__name__}"
    ray.init(num_cpus=2, include_dashboard=False, _tracing_startup_hook=hook)
    own = TelemetryConfig(tracer_provider=trace.get_tracer_provider)
    with trace.get_tracer("user").start_as_current_span("train"):
        its = asyncsplit.streaming_split(
            ray.data.range(200, override_num_blocks=4), 2, options=SplitOptions(telemetry=own)
        )
        workers: list[Any] = [ray.remote(Worker).options(num_cpus=0).remote(it) for it in its]
        print(sum(ray.get([worker.train.remote() for worker in workers])))
    ray.shutdown()


if __name__ == "__main__":
    main()
