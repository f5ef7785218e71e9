"""What is between consumers and coordinator: late, twice, in another order, or not at first."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ActorDiedError, OwnerDiedError

RETRY_S = 0.5
"""After which time a message or reply that was lost is sent again."""

DEATH_NEWS_S = 2.0
"""How long the news of an owner's death may take."""


@dataclass
class Weather:
    """How bad the network is; probabilities per message."""

    slow: float = 0.05
    twice: float = 0.0
    lost: float = 0.0


@dataclass(eq=False)
class Process:
    """Where consumers run: what it has sent arrives, also after its death."""

    name: str
    alive: bool = True
    deaths: list[Callable[[], None]] = field(default_factory=list)

    def kill(self) -> None:
        """Die without a word."""
        self.alive = False
        for mourner in self.deaths:
            mourner()
        self.deaths.clear()


class Call:
    """A call under way, as its reference: has a future, and can be awaited elsewhere."""

    def __init__(self, process: Process, loop: asyncio.AbstractEventLoop) -> None:
        self._process = process
        self._loop = loop
        self._future: Future[Any] = Future()
        self._settled: asyncio.Future[Any] = loop.create_future()

    def future(self) -> "Future[Any]":
        """Return what the caller waits for."""
        return self._future

    def answer(self, reply: Any) -> None:
        """Take the first reply; the others are repetitions."""
        if self._process.alive and not self._future.done():
            self._future.set_result(reply)
            self._settled.set_result(None)

    def refuse(self) -> None:
        """Fail as calls out of a dead process do: nobody sees it."""
        self._future.set_exception(ActorDiedError())

    def __await__(self) -> Generator[Any, None, Any]:
        """Return when the call has, or raise once the caller's process is known to be dead."""
        died = self._loop.create_future()

        def tell() -> None:
            if not died.done():
                died.set_result(None)

        def mourn() -> None:
            late = random.Random(self._process.name).uniform(0.01, DEATH_NEWS_S)
            self._loop.call_later(late, tell)

        if self._process.alive:
            self._process.deaths.append(mourn)
        else:
            mourn()
        yield from asyncio.wait(
            (self._settled, died), return_when=asyncio.FIRST_COMPLETED
        ).__await__()
        if died.done():
            raise OwnerDiedError("00", None, "")


class Network:
    """Carries calls to one coordinator."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, weather: Weather, random: random.Random
    ) -> None:
        self._loop = loop
        self._weather = weather
        self._random = random
        self.coordinator: Any = None
        self.tasks: dict[asyncio.Task[None], tuple[Process, str, str]] = {}
        """What the coordinator is at work on."""
        self.messages = 0

    def handle(self, process: Process) -> "Handle":
        """Return an actor handle for one process."""
        return Handle(self, process)

    def send(self, process: Process, method: str, args: tuple[Any, ...]) -> Call:
        """Send a call on its way."""
        call = Call(process, self._loop)
        if method == "release":
            # Sent when garbage is collected, which must not change what comes after it.
            return call
        if not process.alive:
            call.refuse()
            return call
        self._carry(call, process, method, args)
        if method != "hold" and self._chance(self._weather.twice):
            self._carry(call, process, method, args)
        return call

    def parked(self) -> list[str]:
        """Name the calls that have not returned, other than the lifelines of those who live."""
        # The death of a process may be known before its `hold` comes: a slot is all that costs.
        in_order = not (self._weather.slow or self._weather.lost)
        return [
            f"{method}{args} of {process.name}"
            for process, method, args in self.tasks.values()
            if method != "hold" or (in_order and not process.alive)
        ]

    def _carry(self, call: Call, process: Process, method: str, args: tuple[Any, ...]) -> None:
        self.messages += 1

        def send() -> None:
            if process.alive:
                self._carry(call, process, method, args)

        def deliver() -> None:
            task = self._loop.create_task(self._serve(call, send, method, args))
            self.tasks[task] = process, method, str(args[0][:2])
            task.add_done_callback(self.tasks.pop)

        if method != "hold" and self._chance(self._weather.lost):
            self._loop.call_later(RETRY_S, send)
        else:
            self._loop.call_later(self._delay(), deliver)

    async def _serve(
        self, call: Call, again: Callable[[], None], method: str, args: tuple[Any, ...]
    ) -> None:
        serve: Callable[..., Awaitable[Any]] = getattr(self.coordinator, method)
        reply = await serve(*args)
        if method != "hold" and self._chance(self._weather.lost):
            self._loop.call_later(RETRY_S, again)
        else:
            self._loop.call_later(self._delay(), call.answer, reply)

    def _delay(self) -> float:
        if self._chance(self._weather.slow):
            return self._random.uniform(0.1, 2.0)
        return self._random.uniform(0.0005, 0.02)

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability


class Handle:
    """Stands for Ray's actor handle."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process

    def __getattr__(self, method: str) -> "_Method":
        return _Method(self._network, self._process, method)


@dataclass
class _Method:
    network: Network
    process: Process
    name: str

    def remote(self, *args: Any) -> Call:
        """Call it."""
        return self.network.send(self.process, self.name, args)
