"""Openings: the calls that are parked until their epoch has started."""

import asyncio

from asyncsplit.errors import StreamClosedError
from asyncsplit.wire import Started


class Openings:
    """What those get who wait at the barrier, or while the executor starts: one answer each."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._answers: dict[int, asyncio.Future[Started]] = {}

    def expect(self, reader: int) -> bool:
        """Let a reader wait; False if somebody does already, who gets the same answer."""
        if reader in self._answers and not self._answers[reader].done():
            return False
        self._answers[reader] = asyncio.get_running_loop().create_future()
        return True

    async def wait(self, reader: int) -> Started:
        """Return when the reader's epoch has started; raise what keeps it from that."""
        return await asyncio.shield(self._answers[reader])

    def answer(self, reader: int, started: Started) -> None:
        """Let a reader read."""
        if not self._answers[reader].done():
            self._answers[reader].set_result(started)

    def reject(self, reader: int, error: BaseException) -> None:
        """Send a reader home with an error, if it waits."""
        answer = self._answers.get(reader)
        if answer is not None and not answer.done():
            answer.set_exception(error)
            answer.exception()  # the consumer may have left: that nobody looks is no news


def died() -> StreamClosedError:
    """Return what is said to a consumer that is thought dead."""
    return StreamClosedError("the stream's consumer died")


def left() -> StreamClosedError:
    """Return what a stream's own call gets that was closed."""
    return StreamClosedError("the stream was closed before its epoch began")


def shut_down() -> StreamClosedError:
    """Return what all get who wait, and come, after `shutdown`."""
    return StreamClosedError("the split was shut down; create a new one to iterate again")
