"""Bad arguments of streaming_split, which need a dataset to be looked at."""

import subprocess
import sys
from typing import Any

import pytest
import ray

import asyncsplit
from asyncsplit import SplitOptions

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.parametrize(
    ("n", "arguments", "error", "message"),
    [
        (0, {}, ValueError, "n=0 must be 1 or more"),
        (-2, {}, ValueError, "n=-2"),
        (2.0, {}, TypeError, r"n=2\.0 must be an int"),
        (True, {}, TypeError, "n=True must be an int"),
        ("2", {}, TypeError, "n='2'"),
        (2, {"locality_hints": ["a"]}, ValueError, "locality_hints has 1 node ids for n=2"),
        (2, {"locality_hints": "ab"}, TypeError, "locality_hints='ab' must be a list"),
        (2, {"locality_hints": [1, 2]}, TypeError, "locality_hints="),
        (2, {"options": {"routing": "rows"}}, TypeError, "options="),
        (
            2,
            {"options": SplitOptions(coordinator_node_id="moon")},
            ValueError,
            "coordinator_node_id='moon' is no node of this cluster",
        ),
        (
            2,
            {"equal": True, "options": SplitOptions(routing="demand")},
            ValueError,
            "equal=True cannot be combined with routing='demand'",
        ),
        (
            2,
            {"equal": "pad", "options": SplitOptions(routing="demand")},
            ValueError,
            "equal='pad' cannot be combined with routing='demand'",
        ),
        (2, {"equal": "repeat"}, ValueError, "equal='repeat' is unknown: use True, False or 'pad'"),
    ],
)
def test_streaming_split(
    n: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        asyncsplit.streaming_split(ray.data.range(10), n, **arguments)


def test_without_a_cluster_or_without_cpus_the_error_says_what_to_do() -> None:
    script = """
import ray, asyncsplit
ray.init(num_cpus=0, include_dashboard=False, log_to_driver=False)
ds = ray.data.range(10)
try:
    list(asyncsplit.iter_batches(ds))
except RuntimeError as error:
    print(error)
ray.shutdown()
try:
    asyncsplit.streaming_split(ds, 2)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("the Ray cluster has no CPUs")
    assert "num_cpus=1" in first
    assert second.startswith("Ray is not running")
