"""Lifelines: how the coordinator learns that a process of consumers has died.

A process calls `hold` on the coordinator, which does not return, and hands the reference to its
result over. The process owns that object, so awaiting it raises when the process dies: no
heartbeat, no timeout to choose. Measured with Ray 2.60: within 2 s of a SIGKILL.
"""

import asyncio
import contextlib
import functools
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from asyncsplit.core.epochs import Epochs, Stream
from asyncsplit.remote import Coordinator, Reply, ask, quietly
from asyncsplit.wire import Lifeline

VERDICT_S = 3.0
"""How long the news of a death may take."""

_own: "weakref.WeakValueDictionary[Coordinator, OwnLifeline]" = weakref.WeakValueDictionary()


class OwnLifeline:
    """This process's lifeline to a coordinator: for all its consumers, as long as any lives.

    One for each stream would take three round trips of its own in each epoch: the call, the
    coordinator's question for its result, and the news that nobody refers to that any more. And a
    parked call takes 53 KiB of the coordinator.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        """Park a call; use `of` instead."""
        self._coordinator: Coordinator = coordinator
        name = uuid.uuid4().hex[:12]
        self.call = Lifeline(name, coordinator.hold.remote((name,)))
        # A parked call keeps the coordinator alive, when nobody has a handle any more.
        release = functools.partial(ask, coordinator, "release", name)
        weakref.finalize(self, quietly, release).atexit = False

    @classmethod
    def of(cls, coordinator: Coordinator) -> "OwnLifeline":
        """Return this process's, which ends when nobody refers to it."""
        if (own := _own.get(coordinator)) is None:
            own = _own[coordinator] = cls(coordinator)
        return own

    def ask(self, method: str, *args: object) -> "Future[Reply[Any]]":
        """Call a method of the coordinator; whoever has this to call keeps the lifeline."""
        return ask(self._coordinator, method, *args)


@dataclass(eq=False)
class _Held:
    """What hangs on a process's lifeline: its open streams."""

    mourners: dict[Stream, Callable[[], None]] = field(default_factory=dict)
    is_dead: bool = False


class Lifelines:
    """The parked calls of all processes, the streams open there, and who waits for news of one."""

    def __init__(self) -> None:
        """Start with none."""
        self._parked: dict[str, asyncio.Future[None]] = {}
        self._held: dict[str, _Held] = {}
        self._holding: dict[Stream, _Held] = {}
        self._news: dict[Stream, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def hold(self, name: str) -> None:
        """Return when the lifeline of this name is released."""
        parked = self._parked[name] = asyncio.get_running_loop().create_future()
        await parked

    def release(self, name: str) -> None:
        """Let a lifeline's parked call return: nobody reads in its process any more."""
        parked = self._parked.pop(name, None)
        if parked is not None and not parked.done():
            parked.set_result(None)

    def attach(
        self, stream: Stream, lifeline: Lifeline, died: Callable[[], None]
    ) -> "Callable[[], bool]":
        """Call ``died`` if the lifeline's process dies before the stream is detached.

        Returns:
            What tells whether it has died.
        """
        if (held := self._held.get(lifeline.name)) is None:
            held = self._held[lifeline.name] = _Held()
            task = asyncio.get_running_loop().create_task(self._watch(lifeline, held))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        held.mourners[stream] = died
        self._holding[stream] = held
        return lambda: held.is_dead

    def detach(self, stream: Stream) -> None:
        """Note that a stream is closed, or its consumer dead."""
        if (held := self._holding.pop(stream, None)) is not None:
            held.mourners.pop(stream, None)
        if (news := self._news.pop(stream, None)) is not None:
            news.set()

    async def _watch(self, lifeline: Lifeline, held: _Held) -> None:
        try:
            await lifeline.ref
        except RayError:
            held.is_dead = True
            for stream, died in tuple(held.mourners.items()):
                died()
                self.detach(stream)
            self.release(lifeline.name)
        finally:
            del self._held[lifeline.name]

    async def verdict(self, epochs: Epochs, split: int, stream: Stream) -> None:
        """Give the news that a split's consumer has died the time it takes to come.

        ``stream`` is the one that came for the split. A replacement may be quicker than that news;
        an intruder is not made faster by a wait.
        """
        now = asyncio.get_running_loop().time
        until = {stream.consumer: now()}
        while (holder := epochs.holder(split)) and holder.consumer not in epochs.dead:
            # While this one waits, another one may be let in that has died since.
            if until.setdefault(holder.consumer, now() + VERDICT_S) <= now():
                return
            await self._news_of(holder, until[holder.consumer])

    async def _news_of(self, stream: Stream, until: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._news.setdefault(stream, asyncio.Event()).wait()
