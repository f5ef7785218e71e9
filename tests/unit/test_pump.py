import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asyncsplit.engine import Block, Bundle
from asyncsplit.pump import BURST, Pump
from asyncsplit.telemetry.state import PumpClock

REF: Any = object()


BUNDLE = Bundle((Block(REF, 0, 1, 1, None),), None)


class Output:
    """Stands for an execution: what there is at once, and whether more can come."""

    def __init__(self, bundles: int, *, ends: bool = False, error: Exception | None = None) -> None:
        self.left = bundles
        self._ends = ends
        self._error = error
        self._more = threading.Event()

    def next_bundle(self) -> Bundle:
        if not self.left:
            if self._error is not None:
                raise self._error
            self._more.wait()
            raise StopIteration
        self.left -= 1
        return BUNDLE

    @property
    def has_output(self) -> bool:
        return self.left > 0

    def ends_here(self) -> bool:
        return self._ends and not self.left

    def let_go(self) -> None:
        self._more.set()


class Endless(Output):
    """Says that there is more, whether there is or not."""

    @property
    def has_output(self) -> bool:
        return True


class Brought:
    """What the loop is brought, and how often it is."""

    def __init__(self) -> None:
        self.deliveries: list[tuple[int, BaseException | None]] = []
        self._came = asyncio.Event()

    def receive(self, bundles: list[Bundle], end: BaseException | None) -> None:
        self.deliveries.append((len(bundles), end))
        self._came.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._came.clear()
                await self._came.wait()

    @property
    def bundles(self) -> int:
        return sum(bundles for bundles, _ in self.deliveries)


Start = Callable[[Output], tuple[Pump, Brought]]


@pytest.fixture
def pumped() -> Iterator[Start]:
    pumps: list[tuple[Pump, Output]] = []

    def start(output: Output) -> tuple[Pump, Brought]:
        brought = Brought()
        execution: Any = output
        pump = Pump(execution, brought.receive, "pump", PumpClock())
        pumps.append((pump, output))
        return pump, brought

    yield start
    for pump, output in pumps:
        pump.stop()
        output.let_go()
        pump.join()


@pytest.mark.asyncio
async def test_all_that_there_is_at_once_is_delivered_together_with_its_end(pumped: Start) -> None:
    pump, brought = pumped(Output(BURST - 1, ends=True))
    pump.allow(10 * BURST)
    await brought.until(lambda: bool(brought.deliveries))
    ((bundles, end),) = brought.deliveries
    assert bundles == BURST - 1
    assert isinstance(end, StopIteration)


@pytest.mark.asyncio
async def test_the_last_before_a_wait_does_not_wait_along(pumped: Start) -> None:
    pump, brought = pumped(Output(3))
    pump.allow(100)
    await brought.until(lambda: brought.bundles == 3)
    assert brought.deliveries == [(3, None)]


@pytest.mark.asyncio
async def test_without_credit_for_more_it_delivers_what_it_has(pumped: Start) -> None:
    output = Output(10)
    pump, brought = pumped(output)
    pump.allow(2)
    await brought.until(lambda: brought.bundles == 2)
    assert output.left == 8
    assert not pump.wanting
    pump.allow(1)
    await brought.until(lambda: brought.bundles == 3)


@pytest.mark.asyncio
async def test_a_long_burst_is_not_kept_to_its_end(pumped: Start) -> None:
    pump, brought = pumped(Endless(BURST))
    pump.allow(10 * BURST)
    await brought.until(lambda: brought.bundles == BURST)


@pytest.mark.asyncio
async def test_an_error_comes_after_what_was_taken_before(pumped: Start) -> None:
    error = ValueError("boom")
    pump, brought = pumped(Output(2, error=error))
    pump.allow(100)
    await brought.until(
        lambda: brought.deliveries[-1:] == [(0, error)] or (2, error) in brought.deliveries
    )
    assert brought.bundles == 2


@pytest.mark.asyncio
async def test_nothing_is_delivered_after_a_stop(pumped: Start) -> None:
    output = Output(1)
    pump, brought = pumped(output)
    pump.allow(100)
    pump.stop()
    output.let_go()
    await asyncio.to_thread(pump.join)
    await asyncio.sleep(0)
    assert brought.deliveries == []
