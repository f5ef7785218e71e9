"""Fixtures of the integration tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from asyncsplit import AsyncDataIterator
from tests.integration.consume import Reader


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
