"""What a feed says of itself between two messages."""

import contextlib
from concurrent.futures import Future
from typing import Any

import pytest

from asyncsplit.consumer import Consumer
from asyncsplit.core.epochs import Stream
from asyncsplit.core.ledger import Position, fingerprint
from asyncsplit.feed import Feed
from asyncsplit.pipeline import Pipeline
from asyncsplit.wire import Delivery, Slice, Started
from tests.simulation.clock import VirtualLoop
from tests.simulation.dataset import Ref
from tests.simulation.world import fakes_installed, use_clock


class Answers:
    """Stands for an actor handle: each call of a method has the next of its answers at once."""

    def __init__(self, **answers: list[object]) -> None:
        self._answers = answers
        self._method = ""

    def __getattr__(self, method: str) -> "Answers":
        self._method = method
        return self

    def remote(self, *args: object) -> "Answers":
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
