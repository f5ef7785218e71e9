"""What a feed says of itself between two messages."""

import asyncio
import contextlib
import itertools
from concurrent.futures import Future
from typing import Any
from unittest.mock import patch

import pytest

from asyncsplit import feed as feed_module
from asyncsplit import stream as stream_module
from asyncsplit.consumer import Consumer
from asyncsplit.core.epochs import Stream
from asyncsplit.core.position import Position, fingerprint
from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.feed import FEED_S, Feed
from asyncsplit.pipeline import Pipeline
from asyncsplit.stream import BatchStream
from asyncsplit.wire import Delivery, Rejoin, Slice, Started
from tests.simulation.clock import VirtualLoop
from tests.simulation.dataset import ROW_BYTES, Ref
from tests.simulation.world import fakes_installed, use_clock


class Answers:
    """Stands for an actor handle: each call of a method has the next of its answers at once."""

    def __init__(self, **answers: list[object]) -> None:
        self._answers = answers
        self._method = ""
        self.calls: list[str] = []

    def __getattr__(self, method: str) -> "Answers":
        self._method = method
        return self

    def remote(self, *args: object) -> "Answers":
        self.calls.append(self._method)
        return self

    def future(self) -> "Future[Any]":
        future: Future[Any] = Future()
        if answers := self._answers.get(self._method):
            future.set_result(answers.pop(0))
        return future


@pytest.mark.parametrize("at_once", [False, True])
def test_who_takes_over_within_a_slice_has_that_slice_in_its_fingerprint(at_once: bool) -> None:
    """Also before it has begun it: a coordinator that is restarted then would refuse it.

    The first slices may come with the news that the epoch has started.
    """
    loop = VirtualLoop()
    use_clock(loop)
    half_read = Slice(Ref(range(5), loop, 1.0), 0, 5, 40)  # type: ignore[arg-type]
    first = Delivery(1, (half_read,), end=False, skip_rows=2, check=fingerprint(0, 3))
    coordinator: Any = Answers(
        start_epoch=[Started(Position(0, rows=5), 100, delivery=first if at_once else None)],
        pull=[] if at_once else [first],
    )
    with fakes_installed(), contextlib.closing(loop):
        feed = Feed(
            Consumer(coordinator, 0, 0),
            Stream("it", 1),
            Pipeline(batch_size=None, batch_format=None),
            prefetch_batches=1,
            batch_size=None,
        )
        for _ in range(3):
            feed.advance(0)
        assert feed.backlog == 1, "the block is on its way"
        both = fingerprint(fingerprint(0, 3), 5)
        assert feed.position(0) == Position(0, rows=5, check=both, fed=1)


@pytest.mark.parametrize(("end", "says"), [(True, "acknowledge"), (False, "pull")])
def test_a_loop_that_has_arrived_early_says_that_it_has_begun(end: bool, says: str) -> None:
    """Also where its first blocks are its last: else its death would be no news for long."""
    loop = VirtualLoop()
    use_clock(loop)
    whole = Slice(Ref(range(5), loop, 0.0), 0, 5, 40)  # type: ignore[arg-type]
    started = Started(Position(1), 100, Delivery(0, (whole,), end=end))
    coordinator: Any = Answers(start_epoch=[started])
    with fakes_installed(), contextlib.closing(loop):
        consumer = Consumer(coordinator, 0, 0)
        consumer.arrive_early()
        coordinator.calls.clear()
        feed = Feed(
            consumer,
            Stream("it", 1),
            Pipeline(batch_size=None, batch_format=None),
            prefetch_batches=1,
            batch_size=None,
        )
        for _ in range(3):
            feed.advance(0)
    assert coordinator.calls == [says]


def sent_for(node_id: str, *, rows: int, seconds: float, prefetch_batches: int) -> int:
    """Return how many of 20 blocks a feed asks for before it has fed the first."""
    loop = VirtualLoop()
    use_clock(loop)
    refs = [Ref(range(rows), loop, seconds) for _ in range(20)]
    slices = tuple(
        Slice(ref, 0, rows, rows * ROW_BYTES, node_id=node_id)  # type: ignore[arg-type]
        for ref in refs
    )
    coordinator: Any = Answers(
        start_epoch=[Started(Position(0), 10**6, Delivery(0, slices, end=True))]
    )
    with fakes_installed(), contextlib.closing(loop):
        feed = Feed(
            Consumer(coordinator, 0, 0),
            Stream("it", 1),
            Pipeline(batch_size=rows, batch_format=None),
            prefetch_batches=prefetch_batches,
            batch_size=rows,
        )
        feed.advance(0)
    return sum(ref.is_sent_for for ref in refs)


def test_small_blocks_of_another_node_are_sent_for_ahead_of_their_group() -> None:
    """They would be asked for together, and only when the first of them is needed."""

    def sent(node_id: str) -> int:
        return sent_for(node_id, rows=5, seconds=1.0, prefetch_batches=9)

    assert sent("node") == 3, "a group, on the consumer's own node"
    assert sent("another node") == 10, "and as far as prefetch_batches says, elsewhere"


def test_large_blocks_on_the_node_are_fetched_together() -> None:
    def sent(node_id: str) -> int:
        return sent_for(node_id, rows=10, seconds=0.0, prefetch_batches=1)

    assert sent("node") == 4, "as many as may be fetched together"
    assert sent("another node") == 2, "as far as prefetch_batches says"


def test_who_has_begun_nothing_draws_as_a_restarted_coordinator_says() -> None:
    """Its fellows, if there are any, may have begun another order by then."""
    loop = VirtualLoop()
    use_clock(loop)
    slices = (Slice(Ref(range(5), loop, 1.0), 0, 5, 40),)  # type: ignore[arg-type]
    coordinator: Any = Answers(
        start_epoch=[
            Started(Position(0, shuffle=ShuffleKey(10, 5, seed)), 100, Delivery(0, slices, end=end))
            for seed, end in ((1, False), (2, True))
        ],
        pull=[Rejoin()],
    )
    with fakes_installed(), contextlib.closing(loop):
        pipeline = Pipeline(batch_size=5, batch_format=None, shuffle_buffer_size=10)
        feed = Feed(
            *(Consumer(coordinator, 0, 0), Stream("it", 1), pipeline),
            prefetch_batches=1,
            batch_size=5,
        )
        for _ in range(3):
            feed.advance(0)
        assert pipeline.shuffle == ShuffleKey(10, 5, 2)
        assert feed.backlog == 1


def test_a_batch_of_many_blocks_leaves_the_loop_to_others_as_it_is_made() -> None:
    """And it loses none of them if it is cancelled there."""
    loop = VirtualLoop()
    use_clock(loop)
    refs = [Ref(range(i, i + 1), loop, 0.0) for i in range(60)]
    slices = tuple(Slice(ref, 0, 1, ROW_BYTES) for ref in refs)  # type: ignore[arg-type]
    coordinator: Any = Answers(
        start_epoch=[Started(Position(0), 10**6, Delivery(0, slices, end=True))],
        notify_split_finished=[None],
    )
    looks = itertools.count()

    def slow() -> float:
        return next(looks) * FEED_S / 3

    def pipeline() -> Pipeline:
        return Pipeline(batch_size=60, batch_format="numpy")

    async def run() -> tuple[int, list[int]]:
        stream: BatchStream[Any] = BatchStream(
            Consumer(coordinator, 0, 0), pipeline, prefetch_batches=1, batch_size=60
        )
        cancelled = 0
        while True:
            # Not one that is done before it was ever left to others.
            attempt = asyncio.ensure_future(anext(stream))
            for _ in range(2):
                await asyncio.sleep(0)
            if cancelled < 3 and attempt.cancel():
                cancelled += 1
                await asyncio.wait((attempt,))
                assert attempt.cancelled()
                continue
            batch = await attempt
            await stream.aclose()
            return cancelled, batch["id"].tolist()

    with (
        fakes_installed(),
        contextlib.closing(loop),
        patch.object(feed_module, "perf_counter", slow),
        patch.object(stream_module, "perf_counter", slow),
    ):
        cancelled, ids = loop.run_until_complete(run())
    assert cancelled == 3
    assert ids == list(range(60))
