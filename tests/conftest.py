"""What every test shares: Hypothesis profiles, the blocking-call detector, Ray and its readers."""

import asyncio
import functools
import inspect
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import ray
from blockbuster import BlockBuster, BlockBusterFunction
from hypothesis import HealthCheck, is_hypothesis_test, settings

import asyncsplit
from asyncsplit import AsyncDataIterator
from tests.integration.consume import Reader

PACKAGE = asyncsplit.__path__[0] + os.sep
RAY = ray.__path__[0] + os.sep

# A hung async test fails on its own, with its stack, before pytest-timeout ends the whole run.
ASYNC_TEST_LIMIT_S = 200


def _register_hypothesis_profiles() -> None:
    # How fast the machine is must not decide whether a property holds.
    untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("dev", untimed, max_examples=100)
    # The same examples each time, so that what fails in CI fails because of the change. No more of
    # them: CI tries many more in a run of their own.
    settings.register_profile("ci", untimed, max_examples=100, derandomize=True)
    settings.register_profile("deep", untimed, max_examples=2_000, derandomize=True)
    settings.register_profile("nightly", untimed, max_examples=20_000, print_blob=True)
    default = "ci" if os.environ.get("CI", "").lower() in {"1", "true"} else "dev"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", default))


_register_hypothesis_profiles()

# A shell that runs the tests in the background has Ctrl-C ignored, and so would have all that the
# tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bound every async test, apart from Hypothesis's, which are many runs in one."""
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and inspect.iscoroutinefunction(item.obj)
            and not is_hypothesis_test(item.obj)
        ):
            item.obj = _bounded(item.obj)


def _bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*args: object, **kwargs: object) -> None:
        async with asyncio.timeout(ASYNC_TEST_LIMIT_S):
            await test(*args, **kwargs)

    return bounded


def _called_by_ray() -> bool:
    """Whether Ray stands between the blocking call and the nearest asyncsplit function."""
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code.co_filename.startswith(RAY):
            return True
        if frame.f_code.co_filename.startswith(PACKAGE):
            return False
    return False


def _forgive_ray(function: BlockBusterFunction) -> None:
    original = function.can_block_predicate
    function.can_block_predicate = lambda *args, **kwargs: (
        original(*args, **kwargs) or _called_by_ray()
    )


@pytest.fixture
def detect_blocking() -> Iterator[BlockBuster]:
    """Raise `blockbuster.BlockingError` where asyncsplit blocks a running event loop."""
    detector = BlockBuster(asyncsplit)
    for name, function in detector.functions.items():
        # A sleep blocks whoever sleeps. Ray's short locks and file reads are not ours to judge.
        if name != "time.sleep":
            _forgive_ray(function)
    for name in ("ray.get", "ray.wait"):
        detector.functions[name] = BlockBusterFunction(
            None,
            name,
            scanned_modules=asyncsplit,
            can_block_predicate=lambda *_, timeout=None, **__: timeout == 0,
        )
    detector.activate()
    yield detector
    detector.deactivate()


@pytest.fixture(autouse=True)
def _detect_blocking_in_async_tests(request: pytest.FixtureRequest) -> None:
    # Sync tests do without: the detector slows down every lock and file access of the process.
    if request.node.get_closest_marker("asyncio"):
        request.getfixturevalue("detect_blocking")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster of two CPUs for all tests of a process."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Return a function that starts a Reader; all are killed at the end."""
    readers: list[Any] = []

    def start(it: AsyncDataIterator, **kwargs: Any) -> Any:
        readers.append(ray.remote(Reader).options(num_cpus=0).remote(it, **kwargs))
        return readers[-1]

    yield start
    for reader in readers:
        ray.kill(reader)
