"""On demand, between decision and event loop: what a feed says, and when a pull is answered."""

import asyncio
import contextlib
from concurrent.futures import Future
from typing import Any, cast

from asyncsplit.collate import Collated
from asyncsplit.consumer import Consumer
from asyncsplit.core.epochs import Stream
from asyncsplit.core.ledger import Ledger
from asyncsplit.core.position import Position
from asyncsplit.core.progress import Progress
from asyncsplit.core.routing import Part, make_router
from asyncsplit.distribution import Distribution
from asyncsplit.feed import Feed
from asyncsplit.pipeline import Pipeline
from asyncsplit.telemetry.counters import ConsumerCounters
from asyncsplit.wire import Delivery, Slice, Started
from tests.simulation.clock import VirtualLoop
from tests.simulation.dataset import Ref
from tests.simulation.world import fakes_installed, use_clock


class Coordinator:
    """Stands for an actor handle: lets all arrive with what is given, and notes what they say."""

    def __init__(self, started: Started) -> None:
        self.said: list[tuple[str, int | None]] = []
        """For each message its method, and how many rows are ahead."""
        self._started = started
        self._method = ""
        self._answer: Future[Any] = Future()

    def __getattr__(self, method: str) -> "Coordinator":
        self._method = method
        return self

    def remote(self, *args: Any) -> "Coordinator":
        self._answer = Future()
        if self._method == "start_epoch":
            self._answer.set_result(self._started)
        elif self._method != "hold":
            self.said.append((self._method, args[-1][-1]))
        return self

    def future(self) -> "Future[Any]":
        return self._answer


def feed_of(
    loop: VirtualLoop, pipeline: Pipeline | Collated, *, on_demand: bool = True
) -> tuple[Feed, Coordinator]:
    """Return a feed that arrives and is given a block of 10 rows."""
    block = Slice(Ref(range(10), loop, 0.0), 0, 10, 80)  # type: ignore[arg-type]
    delivery = Delivery(0, (block,), end=False)
    started = Started(Position(0), 1, delivery, on_demand=on_demand)
    coordinator = Coordinator(started)
    consumer = Consumer(cast("Any", coordinator), 0, 0)
    feed = Feed(consumer, Stream("it", 1), pipeline, prefetch_batches=1, batch_size=4)
    for _ in range(3):
        feed.advance(0)
    return feed, coordinator


def test_who_asks_early_says_so_once_when_it_runs_out() -> None:
    loop = VirtualLoop()
    use_clock(loop)
    with fakes_installed(), contextlib.closing(loop):
        pipeline = Pipeline(batch_size=4, batch_format=None)
        feed, coordinator = feed_of(loop, pipeline)
        assert coordinator.said == [("pull", 8)], "two batches"
        next(pipeline.batches)
        feed.advance(0)
        assert len(coordinator.said) == 1, "there is another batch"
        next(pipeline.batches)
        assert next(pipeline.batches) is None
        for _ in range(3):
            feed.advance(8)
        assert coordinator.said[1:] == [("acknowledge", -2)], "the next batch lacks two rows"


def test_batches_made_ahead_of_the_loop_are_not_ahead_of_what_makes_them() -> None:
    loop = VirtualLoop()
    use_clock(loop)
    with fakes_installed(), contextlib.closing(loop):
        for ahead, rows in ((1, 4), (2, -2), (5, -14)):
            pipeline = Pipeline(batch_size=4, batch_format=None)
            collated = Collated(pipeline, lambda batch: batch, ahead=ahead)
            _, coordinator = feed_of(loop, collated)
            assert coordinator.said == [("pull", rows)]
            collated.close()


def test_by_rows_nobody_says_what_is_ahead() -> None:
    loop = VirtualLoop()
    use_clock(loop)
    with fakes_installed(), contextlib.closing(loop):
        pipeline = Pipeline(batch_size=4, batch_format=None)
        feed, coordinator = feed_of(loop, pipeline, on_demand=False)
        next(pipeline.batches)
        next(pipeline.batches)
        feed.advance(8)
        assert coordinator.said == [("pull", None)]


def test_a_pull_that_comes_early_is_answered_when_it_is_due_and_is_no_wait_before() -> None:
    loop = VirtualLoop()

    async def hold() -> None:
        ledger = Ledger(1, make_router(1, equal=False, routing="demand"), 10**6)
        ledger.produce(Part(number, 0, 10, 80) for number in range(100))
        distribution = Distribution(ledger, cast("Any", None), lambda _: None)

        def ask(rows: int, fed: int, ahead: int = 10) -> None:
            distribution.ask(0, ahead, ConsumerCounters(rows=rows, stream_s=float(rows)))
            distribution.acknowledge(0, Progress(rows, fed))

        ask(0, 0)
        ask(0, 1)
        assert ledger.logs[0].waiting == 1
        ask(10, 2)
        pull = asyncio.create_task(distribution.news(0, loop.time()))
        await asyncio.sleep(0)
        assert distribution.waiting_since == {0: 8.0}, "10 s less a fifth"
        assert not ledger.blockers()
        assert await pull
        assert loop.time() == 8.0
        ask(20, 3)
        pull = asyncio.create_task(distribution.news(0, loop.time()))
        await asyncio.sleep(1.0)
        ask(20, 3, ahead=0)
        assert await pull, "it has run out"
        assert loop.time() == 9.0
        ask(30, 4)
        pull = asyncio.create_task(distribution.news(0, loop.time()))
        await asyncio.sleep(0)
        distribution.stop()
        assert await pull
        await asyncio.sleep(60.0)
        assert not ledger.logs[0].waiting, "nothing is given any more"

    with contextlib.closing(loop):
        loop.run_until_complete(hold())
