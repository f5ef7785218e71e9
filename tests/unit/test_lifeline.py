"""Tests for `asyncsplit.lifeline`, with futures in place of references."""

import asyncio
from functools import partial
from typing import Any, cast

import pytest
from ray.exceptions import OwnerDiedError

from asyncsplit.core.epochs import Stream
from asyncsplit.lifeline import Lifelines
from asyncsplit.wire import Lifeline

pytestmark = pytest.mark.asyncio


def lifeline(name: str) -> "tuple[Lifeline, asyncio.Future[Any]]":
    ref = asyncio.get_running_loop().create_future()
    return Lifeline(name, cast("Any", ref)), ref


async def settle() -> None:
    """Let everything run that needs no time."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_death_of_a_process_reaches_all_its_streams_and_no_others() -> None:
    lifelines, died = Lifelines(), list[str]()
    (one, ref), (other, _) = lifeline("one"), lifeline("other")
    parked = asyncio.create_task(lifelines.hold("one"))
    dead = [
        lifelines.attach(Stream(consumer, 1), where, partial(died.append, consumer))
        for consumer, where in (("a", one), ("b", one), ("c", other), ("d", one))
    ]
    lifelines.detach(Stream("d", 1))
    await settle()
    assert not died
    assert not parked.done()
    ref.set_exception(OwnerDiedError("00", None, ""))
    await settle()
    assert died == ["a", "b"]
    assert [each() for each in dead] == [True, True, False, True]
    assert parked.done(), "its call returns: that of a dead process would stay for good"


async def test_what_a_process_sent_before_its_death_comes_after_it() -> None:
    lifelines, died = Lifelines(), list[str]()
    one, ref = lifeline("one")
    ref.set_exception(OwnerDiedError("00", None, ""))
    for consumer in "ab":
        is_dead = lifelines.attach(Stream(consumer, 1), one, partial(died.append, consumer))
        await settle()
        assert is_dead()
    assert died == ["a", "b"]


async def test_a_released_lifeline_is_no_death() -> None:
    lifelines, died = Lifelines(), list[str]()
    one, ref = lifeline("one")
    parked = asyncio.create_task(lifelines.hold("one"))
    is_dead = lifelines.attach(Stream("a", 1), one, partial(died.append, "a"))
    await settle()
    lifelines.release("one")
    await parked
    ref.set_result(None)
    await settle()
    assert not is_dead()
    assert not died
    assert not lifelines._held
