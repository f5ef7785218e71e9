"""Bad input is refused with an error that names argument, value and what is allowed."""

from typing import Any, cast

import pytest

import asyncsplit
from asyncsplit import AsyncDataIterator, SplitOptions, TelemetryConfig, engine


@pytest.fixture
def iterator() -> AsyncDataIterator:
    return AsyncDataIterator(cast("Any", None), 0, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0 must be 1 or more"),
        ({"batch_size": -3}, ValueError, "batch_size=-3"),
        ({"batch_size": 2.5}, TypeError, r"batch_size=2\.5 must be an int"),
        ({"batch_size": True}, TypeError, "batch_size=True"),
        ({"prefetch_batches": -1}, ValueError, "prefetch_batches=-1 must be 0 or more"),
        ({"prefetch_batches": None}, TypeError, "prefetch_batches=None"),
        ({"batch_format": "xml"}, ValueError, "batch_format='xml'"),
        ({"local_shuffle_buffer_size": 0}, ValueError, "local_shuffle_buffer_size=0 must be 1"),
        (
            {"local_shuffle_buffer_size": 5, "batch_size": None},
            ValueError,
            "local_shuffle_buffer_size=5 needs a batch_size",
        ),
        ({"local_shuffle_seed": "x"}, TypeError, "local_shuffle_seed='x'"),
        ({"local_shuffle_seed": -1}, ValueError, "local_shuffle_seed=-1"),
    ],
)
def test_iter_batches(
    iterator: AsyncDataIterator,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        iterator.iter_batches(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"routing": "random"}, ValueError, "routing='random' is unknown: use 'rows' or 'demand'"),
        ({"prefetch_bytes": 0}, ValueError, "prefetch_bytes=0 must be 1 or more"),
        ({"prefetch_bytes": 1.5}, TypeError, r"prefetch_bytes=1\.5 must be an int, or None"),
        ({"replicas": 0}, ValueError, "replicas=0 must be 1 or more"),
        ({"replicas": True}, TypeError, "replicas=True must be an int"),
        ({"epochs": 0}, ValueError, "epochs=0 must be 1 or more, or None"),
        ({"epochs": True}, TypeError, "epochs=True must be an int, or None"),
        ({"coordinator_node_id": 7}, TypeError, "coordinator_node_id=7 must be the id of a node"),
        ({"telemetry": None}, TypeError, "telemetry=None must be a TelemetryConfig"),
    ],
)
def test_options(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SplitOptions(**arguments)


@pytest.mark.parametrize("port", [-1, 65536, "9000"])
def test_ports(port: Any) -> None:
    with pytest.raises(ValueError, match=r"TelemetryConfig\.port="):
        TelemetryConfig(port=port)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"discovery_dir": ""}, TypeError, "discovery_dir='' must be a path, True"),
        ({"discovery_dir": None}, TypeError, "discovery_dir=None must be a path, True"),
        ({"meter_provider": 1}, TypeError, "meter_provider=1 must be a function"),
        ({"otlp_endpoint": "localhost:4318"}, ValueError, "'localhost:4318' must be a URL"),
        ({"push_interval_s": 0}, ValueError, "push_interval_s=0 must be a number of seconds"),
        ({"push_interval_s": True}, ValueError, "push_interval_s=True must be a number"),
    ],
)
def test_ways_out_of_metrics(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TelemetryConfig(**arguments)


def test_a_single_consumer_has_no_fellows() -> None:
    with pytest.raises(ValueError, match=r"replicas=2 needs as many consumers"):
        asyncsplit.iter_batches(cast("Any", None), options=SplitOptions(replicas=2))


def test_an_unsupported_ray_is_refused_before_anything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.__version__", "2.40.0")
    with pytest.raises(RuntimeError, match=r"found 2\.40\.0") as raised:
        asyncsplit.streaming_split(cast("Any", None), 1)
    assert engine.SUPPORTED_RAY in str(raised.value)


def test_not_a_dataset() -> None:
    with pytest.raises(TypeError, match=r"ds=\[1, 2\] must be a ray.data.Dataset, not list"):
        asyncsplit.streaming_split(cast("Any", [1, 2]), 1)
