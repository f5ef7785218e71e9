"""Lifelines: how the coordinator learns that a consumer's process has died.

A consumer calls `hold` on the coordinator, which does not return, and hands the reference to its
result back. The consumer's process owns that object, so awaiting it raises when the process dies:
no heartbeat, no timeout to choose. Measured with Ray 2.60: within 2 s of a SIGKILL.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayError

from asyncsplit.core.epochs import Epochs, Stream

VERDICT_S = 3.0
"""How long the news of a death may take."""


class Lifelines:
    """The parked calls of all streams, and those who wait for news of one."""

    def __init__(self) -> None:
        """Start with none."""
        self._parked: dict[Stream, asyncio.Future[None]] = {}
        self._news: dict[Stream, asyncio.Event] = {}

    async def hold(self, stream: Stream) -> None:
        """Return when the stream is released."""
        parked = self._parked[stream] = asyncio.get_running_loop().create_future()
        await parked

    def release(self, stream: Stream) -> None:
        """Let a stream's parked call return, if it has come: the stream is closed, or dead."""
        parked = self._parked.pop(stream, None)
        if parked is not None and not parked.done():
            parked.set_result(None)
        if (news := self._news.pop(stream, None)) is not None:
            news.set()

    async def watch(
        self, stream: Stream, lifeline: "ObjectRef[Any]", died: Callable[[], None]
    ) -> bool:
        """Call ``died``, and return True, if the process dies before the stream is released."""
        try:
            await lifeline
        except RayError:
            died()
            self.release(stream)
            return True
        return False

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
            await self._release_of(holder, until[holder.consumer])

    async def _release_of(self, stream: Stream, until: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._news.setdefault(stream, asyncio.Event()).wait()
