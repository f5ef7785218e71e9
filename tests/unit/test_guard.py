import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from asyncsplit import engine
from asyncsplit.guard import FINISH_AFTER_S, Guard
from asyncsplit.telemetry.state import CoordinatorState


class Executions:
    """Stands for Ray Data: notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, dataset: object, epoch: int) -> "Executions":
        self.calls.append(f"start {epoch}")
        return self

    def finish(self) -> None:
        self.calls.append("finish")

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def schema(self, dataset: object) -> str:
        self.calls.append("schema")
        return "schema"


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> Executions:
    executions = Executions()
    monkeypatch.setattr(engine, "begin_epoch", executions.start)
    monkeypatch.setattr(engine, "dataset_schema", executions.schema)
    return executions


@pytest.fixture
def guard(executions: Executions) -> Iterator[Guard]:
    context: Any = SimpleNamespace(copy=lambda: None)
    dataset: Any = SimpleNamespace(context=context)
    state = CoordinatorState.of("dataset", 1, None)
    with ThreadPoolExecutor(1) as thread:
        yield Guard(dataset, thread, state)


def always() -> bool:
    return True


@pytest.mark.asyncio
async def test_an_exhausted_executor_is_shut_down_before_the_schema_is_asked_for(
    guard: Guard, executions: Executions
) -> None:
    """Its actors may hold the CPUs that finding out takes."""
    await guard.start(0, None, always)
    guard.exhausted()
    assert not guard.active
    await guard.schema("raise", lambda: None, always)
    assert executions.calls == ["start 0", "finish", "schema"]


@pytest.mark.asyncio
async def test_an_exhausted_executor_is_shut_down_before_the_next_starts(
    guard: Guard, executions: Executions
) -> None:
    await guard.start(0, None, always)
    guard.exhausted()
    await guard.start(1, None, always)
    assert executions.calls == ["start 0", "finish", "start 1"]
    assert guard.active


@pytest.mark.asyncio
async def test_an_exhausted_executor_is_shut_down_though_nobody_asks(
    guard: Guard, executions: Executions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncsplit.guard.FINISH_AFTER_S", FINISH_AFTER_S / 20)
    await guard.start(0, None, always)
    guard.exhausted()
    async with asyncio.timeout(20):
        while "finish" not in executions.calls:  # noqa: ASYNC110 - it is another thread's
            await asyncio.sleep(0.001)
    assert executions.calls == ["start 0", "finish"]
