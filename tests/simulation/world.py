"""A whole job in virtual time: the real coordinator, feeds and streams, all else made of a seed.

What is simulated: the network, Ray Data, processes and their deaths. What happens follows from
the seed alone, so a failure comes again whenever it is asked for.
"""

import asyncio
import contextlib
import itertools
import logging
import random
import tempfile
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import asyncsplit.backlog
import asyncsplit.coordinator
import asyncsplit.distribution
import asyncsplit.feed
import asyncsplit.guard
import asyncsplit.pump
import asyncsplit.remote
import asyncsplit.stream
import asyncsplit.waits
from asyncsplit import engine
from asyncsplit.coordinator import SplitCoordinator
from asyncsplit.core.epochs import Phase
from asyncsplit.core.routing import Equal
from asyncsplit.errors import (
    ConsumerConflictError,
    ConsumerLostError,
    StaleEpochError,
    StreamClosedError,
)
from asyncsplit.iterator import AsyncDataIterator
from asyncsplit.options import SplitOptions, TelemetryConfig
from asyncsplit.stream import BatchStream
from asyncsplit.telemetry.tracing import Tracer, Tracing
from asyncsplit.wire import Failure
from tests.simulation import dataset as fakes
from tests.simulation.clock import VirtualLoop
from tests.simulation.dataset import Context, DatasetError, FakeDataset, FakeExecution
from tests.simulation.network import Network, Process, Weather
from tests.simulation.oracle import Oracle

BOUND_S = 4 * 3600.0
"""Virtual seconds within which every run is over."""

REPLACED_AFTER_S = 8.0

SILENT = TelemetryConfig(enabled=False)


@dataclass
class Plan:
    """What happens in a run."""

    n: int
    epochs: int
    rows: int
    largest_block_rows: int
    equal: Equal
    routing: Any
    budget: int
    shuffle: bool
    batch_size: int | None
    drop_last: bool
    prefetch_batches: int
    weather: Weather
    kills: int
    suspects: int
    """How often a consumer is thought dead that is not."""
    breaks: float
    cancels: float
    impatience: float
    """How often a loop gives up before its first batch."""
    pause_s: float
    failures: dict[int, str]
    slow_start_s: float
    impatient: bool
    shut_down_after_s: float | None
    ahead: bool
    """Whether the coordinator knows how many epochs there are, and starts them ahead."""
    in_order: bool
    """Whether the dataset says that it preserves order."""
    asks_after_s: tuple[float, ...] = ()
    """When somebody asks for the schema."""
    replicas: int = 1
    """How many consumers share each split; what is called a split below is then one of them."""

    @property
    def readers(self) -> int:
        return self.n * self.replicas

    @classmethod
    def of(cls, random: random.Random, later: random.Random) -> "Plan":
        """Draw a plan; each trouble is absent from many.

        What was thought of ``later`` is drawn apart, so that older seeds mean what they meant.
        """

        def seldom(value: Any, nothing: Any, chance: float = 0.3) -> Any:
            return value if random.random() < chance else nothing

        equal = random.random() < 0.5
        shuffle = random.random() < 0.2
        n = random.randint(1, 4)
        epochs = random.randint(1, 3)
        return (
            cls(
                n=n,
                epochs=epochs,
                rows=random.choice((1, n, 30, 60, 100, 150)),
                largest_block_rows=random.choice((1, 5, 12, 30)),
                equal=equal,
                routing="rows" if equal else random.choice(("rows", "demand")),
                budget=random.choice((1, 50, 200, 10_000)),
                shuffle=shuffle,
                batch_size=random.choice((1, 3, 7, 20))
                if shuffle
                else random.choice((None, 1, 3, 7)),
                drop_last=random.random() < 0.2,
                prefetch_batches=random.randint(0, 3),
                weather=Weather(
                    slow=seldom(0.1, 0.0, 0.5), twice=seldom(0.1, 0.0), lost=seldom(0.1, 0.0)
                ),
                kills=seldom(random.randint(1, 6), 0, 0.6),
                suspects=seldom(random.randint(1, 3), 0, 0.15),
                breaks=seldom(0.05, 0.0),
                cancels=seldom(0.2, 0.0),
                pause_s=random.choice((0.0, 0.0, 0.1, 2.0)),
                failures={
                    epoch: random.choice(("start", "blocks"))
                    for epoch in range(epochs)
                    if random.random() < 0.1
                },
                slow_start_s=random.choice((0.1, 0.1, 1.0, 20.0)),
                impatient=random.random() < 0.2,
                shut_down_after_s=seldom(random.uniform(0.0, 5.0), None, 0.1),
                impatience=0.3 if later.random() < 0.3 else 0.0,
                ahead=later.random() < 0.3,
                in_order=True,
            )
            ._padded(later)
            ._ordered(later)
            ._replicated(later)
            ._asking(later)
        )

    def _padded(self, later: random.Random) -> "Plan":
        """Fill up short splits in some of the plans with equal shares."""
        return replace(self, equal="pad") if self.equal and later.random() < 0.4 else self

    def _ordered(self, later: random.Random) -> "Plan":
        """Have half of the datasets say that they do not preserve order."""
        return replace(self, in_order=later.random() < 0.5)

    def _replicated(self, later: random.Random) -> "Plan":
        """Have several consumers share each split in some of the plans."""
        return replace(self, replicas=later.choice((2, 3)) if later.random() < 0.25 else 1)

    def _asking(self, later: random.Random) -> "Plan":
        """Have the schema asked for in half of the plans."""
        asks = later.choice((0, 3))
        return replace(self, asks_after_s=tuple(later.uniform(0.0, 5.0) for _ in range(asks)))


class World:
    """One run of a plan."""

    def __init__(
        self,
        seed: int,
        loop: VirtualLoop,
        *,
        verbose: bool = False,
        telemetry: TelemetryConfig = SILENT,
    ) -> None:
        self.random = random.Random(seed)
        self.plan = plan = Plan.of(self.random, random.Random(f"later {seed}"))
        self.loop = loop
        self.verbose = verbose
        self.telemetry = telemetry
        self.network = Network(loop, plan.weather, self.random)
        dataset = FakeDataset(
            plan.rows,
            loop,
            self.random,
            plan.failures,
            plan.slow_start_s,
            plan.largest_block_rows,
            context=Context(preserve_order=plan.in_order),
        )
        loop.seconds_of = dataset.seconds_of
        options = SplitOptions(
            routing=plan.routing,
            prefetch_bytes=plan.budget,
            barrier_timeout_s=5.0 if plan.impatient else 1800.0,
            rejoin_timeout_s=3.0 if plan.impatient else 120.0,
            epochs=plan.epochs if plan.ahead else None,
            replicas=plan.replicas,
            telemetry=telemetry,
        )
        self.coordinator = SplitCoordinator(
            plan.n,
            plan.equal,
            None,
            options,
            dataset,  # type: ignore[arg-type]
        )
        self.network.coordinator = self.coordinator
        self.oracle = Oracle(
            self.coordinator,
            dataset,
            plan.budget,
            plan.equal,
            plan.shuffle,
            (plan.batch_size or 1) - 1 if plan.drop_last else 0,
            replicas=plan.replicas,
        )
        self.errors: list[BaseException] = []
        self.workers: dict[Process, asyncio.Task[None]] = {}
        self.consumers: dict[int, Process] = {}
        self.over = asyncio.Event()
        self.shut = False
        self.born = 0
        loop.after_step = self.step

    def step(self) -> None:
        """Check everything; note when the last epoch is over."""
        self.oracle.step()
        epochs = self.coordinator._runner.epochs
        last = self.plan.epochs - 1
        ended = epochs.epoch == last and epochs.phase is Phase.WAITING
        if (ended or epochs.epoch > last) and not self.shut:
            self.over.set()

    async def run(self) -> None:
        """Run the plan; raise whatever went wrong."""
        everything = [self.loop.create_task(self.cause_trouble())]
        for split in range(self.plan.readers):
            self.spawn(split, self.random.choice((0.0, 0.0, 1.0)))
        everything += [self.loop.create_task(self.ask(s)) for s in self.plan.asks_after_s]
        if self.plan.shut_down_after_s is not None:
            everything.append(self.loop.create_task(self.shut_down(self.plan.shut_down_after_s)))
        try:
            async with asyncio.timeout(BOUND_S):
                await self.over.wait()
        except TimeoutError:
            raise AssertionError(f"not over: {self.describe()}") from None
        finally:
            for task in everything:
                task.cancel()
        if self.errors:
            raise self.errors[0]
        await self.shut_down(0.0)
        if self.errors:
            raise self.errors[0]
        parked = self.network.parked()
        assert not parked, f"never answered: {parked}"
        assert all(pump.ended for pump in self.oracle.dataset.pumps), "a pump's thread is left"
        assert self.oracle.dataset.is_idle, "an executor is left"

    def describe(self) -> str:
        """Return where everybody is."""
        coordinator = self.coordinator
        return (
            f"{coordinator._runner.epochs} pulls={coordinator._runner.distribution._pulls}"
            f" openings={coordinator._runner._openings} calls={self.network.parked()}"
        )

    def say(self, *what: object) -> None:
        """Print what happens, if asked to."""
        if self.verbose:
            print(f"{self.loop.time():9.3f}", *what)

    def spawn(self, split: int, after_s: float) -> None:
        """Start a process that consumes a split."""
        self.born += 1
        process = Process(f"process {self.born}")
        self.consumers[split] = process
        worker = Worker(self, process, split)
        self.workers[process] = self.loop.create_task(worker.live(after_s))

    def replace(self, split: int) -> None:
        """Kill a split's process, and have another one come some time."""
        process = self.consumers[split]
        after_s = self.random.choice((0.0, 0.001, 0.5, self.random.uniform(0, REPLACED_AFTER_S)))
        self.say("kill", process.name, f"{split=}, another in {after_s:.3f} s")
        process.kill()
        self.workers[process].cancel()
        self.spawn(split, after_s)

    async def cause_trouble(self) -> None:
        """Kill consumers, and tell lies about others."""
        troubles = [self.replace] * self.plan.kills + [self.suspect] * self.plan.suspects
        self.random.shuffle(troubles)
        for trouble in troubles:
            await asyncio.sleep(self.random.choice((0.01, 0.1, 1.0, 5.0)) * self.random.random())
            trouble(self.random.randrange(self.plan.readers))

    def suspect(self, split: int) -> None:
        """Report a live consumer dead, and replace it."""
        stream = self.coordinator._runner.epochs.holder(split)
        if stream is None or not self.consumers[split].alive:
            return
        self.say("suspect", self.consumers[split].name, f"{split=}")
        self.network.send(Process("master"), "report_death", ((split, stream),))
        self.spawn(split, self.random.uniform(0, 2.0))

    async def ask(self, after_s: float) -> None:
        """Ask for the schema, which is refused only while an epoch is executed that has begun."""
        await asyncio.sleep(after_s)
        epochs = self.coordinator._runner.epochs
        before = epochs.epoch, epochs.phase
        reply = await self.coordinator.get_dataset_schema(("raise",))
        self.say("the schema is", reply)
        if isinstance(reply, Failure) and (
            before == (epochs.epoch, Phase.WAITING) and epochs.phase is Phase.WAITING
        ):
            self.errors.append(reply.unpack())

    async def shut_down(self, after_s: float) -> None:
        """Shut the split down; all consumers hear of it."""
        await asyncio.sleep(after_s)
        self.say("shut down")
        self.shut = True
        await self.coordinator.shutdown_executor(())
        await asyncio.sleep(60.0)
        left = [process.name for process, task in self.workers.items() if not task.done()]
        if left:
            self.errors.append(AssertionError(f"{left} do not hear of it: {self.describe()}"))
        self.over.set()


class Worker:
    """A training loop in a process, epoch after epoch."""

    def __init__(self, world: World, process: Process, split: int) -> None:
        self.world = world
        self.random = random.Random(world.random.random())
        self.process = process
        self.split = split
        tracing = Tracing.of(world.telemetry, None)
        self.it = AsyncDataIterator(
            world.network.handle(process),  # type: ignore[arg-type]
            split // world.plan.replicas,
            world.plan.n,
            tracing=tracing,
            replica=split % world.plan.replicas,
            replicas=world.plan.replicas,
        )
        if tracing is not None:  # here, and not on a thread, for which no time would pass
            opened: Future[Tracer | None] = Future()
            opened.set_result(tracing.open())
            self.it._consumer._tracer = opened

    async def live(self, after_s: float) -> None:
        """Iterate until killed, replaced, or told that there is no more."""
        await asyncio.sleep(after_s)
        while self.process.alive:
            try:
                await self.read_epoch()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if not self.process.alive:
                    return
                self.world.say(self.process.name, repr(error))
                if not self.expected(error):
                    self.world.errors.append(error)
                    self.world.over.set()
                    return
                replaced = self.world.consumers[self.split] is not self.process
                if self.world.shut or (replaced and isinstance(error, ConsumerConflictError)):
                    return
                await asyncio.sleep(0.1)

    def expected(self, error: Exception) -> bool:
        """Tell whether a plan explains an error."""
        plan, world = self.world.plan, self.world
        if isinstance(error, DatasetError):
            return error.args[0] in plan.failures
        if isinstance(error, ConsumerLostError):
            return plan.impatient
        if isinstance(error, StreamClosedError):
            # The second to answer a call that is sent again is not always as kind as the first.
            return world.shut or plan.suspects > 0 or (plan.impatient and plan.weather.lost > 0)
        if isinstance(error, ConsumerConflictError | StaleEpochError):
            return plan.suspects > 0
        return False

    async def read_epoch(self) -> None:
        """Read an epoch, or a part of it."""
        plan = self.world.plan
        stream = self.it.iter_batches(
            prefetch_batches=plan.prefetch_batches,
            batch_size=plan.batch_size,
            drop_last=plan.drop_last,
            local_shuffle_buffer_size=30 if plan.shuffle else None,
            local_shuffle_seed=self.random.choice((1, 2)) if plan.shuffle else None,
        )
        if plan.impatience and self.random.random() < plan.impatience:
            await self.give_up_soon(stream)
            return
        async with contextlib.AsyncExitStack() as stack:
            if self.random.random() < 0.5:
                await stack.enter_async_context(stream)
            async with contextlib.aclosing(self.batches(stream)) as batches:
                async for _ in batches:
                    await asyncio.sleep(self.random.random() * plan.pause_s)
                    if self.random.random() < plan.breaks:
                        self.world.say(self.process.name, "breaks off", stream)
                        return

    async def batches(self, stream: BatchStream[Any]) -> AsyncGenerator[list[int], None]:
        """Yield a stream's batches, each checked."""
        oracle, split = self.world.oracle, self.split
        seen: list[int] = []
        begin = row = epoch = 0
        began = False
        while True:
            if began:
                oracle.finished(epoch, split, row)
            try:
                batch = await self.next(stream)
            except StopAsyncIteration:
                batch = None
            feed = stream._feed
            assert feed is not None
            assert feed.started is not None
            if not began:
                began = True
                epoch, begin = feed.started.epoch, feed.started.position.rows
                row = begin
                self.world.say(self.process.name, f"{split=} {epoch=} begins at row {begin}")
                oracle.begins(epoch, split, feed._stream, begin)
            if batch is None:
                row += stream._pipeline.rows_dropped
                oracle.finished(epoch, split, row)
                oracle.ended(epoch, split, row)
                self.world.say(self.process.name, f"{split=} {epoch=} ends at row {row}")
                return
            ids = [int(i) for i in batch["id"]]
            assert feed.started.epoch == epoch
            seen += ids
            padded = stream.statistics().padded_rows
            assert len(seen) - len(set(seen)) <= padded < self.world.plan.n, "a row came twice"
            oracle.delivered(epoch, split, row, ids)
            row += len(ids)
            yield ids

    async def give_up_soon(self, stream: BatchStream[Any]) -> None:
        """Leave before the first batch, mostly: at the barrier, or while the epoch starts."""
        with contextlib.suppress(TimeoutError, StopAsyncIteration):
            async with asyncio.timeout(self.random.choice((0.1, 1.0, 10.0)) * self.random.random()):
                await anext(stream)
        self.world.say(self.process.name, "gives up", stream)
        if stream._feed is not None and stream._feed.started is None:
            self.world.oracle.unaware.add(stream._feed._stream)
        await stream.aclose()

    async def next(self, stream: BatchStream[Any]) -> Any:
        """Return the next batch, after some cancelled attempts perhaps."""
        while self.random.random() < self.world.plan.cancels:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.random.choice((0.0, 0.001, 0.1))):
                    return await anext(stream)
        return await anext(stream)


@contextlib.contextmanager
def fakes_installed() -> Iterator[None]:
    """Put the fakes where the package expects Ray, its threads and its clocks."""
    with contextlib.ExitStack() as stack:

        def put(where: Any, name: str, fake: Any) -> None:
            stack.enter_context(patch.object(where, name, fake))

        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        put(engine, "actor_file", lambda: directory / _actor)
        put(engine, "begin_epoch", FakeExecution.start)
        put(engine, "dataset_schema", FakeDataset.schema)
        put(engine, "dataset_tag", lambda dataset: "simulated")
        put(engine, "use_context", lambda context: None)
        put(engine, "node_id", lambda: "node")
        put(engine, "get_packed", fakes.get_packed)
        put(engine, "pickled", fakes.pickled)
        put(engine, "unpack", fakes.unpack)
        put(asyncsplit.backlog, "ray", SimpleNamespace(wait=fakes.wait, ObjectRef=Any))
        put(asyncsplit.remote, "ray", SimpleNamespace(is_initialized=lambda: True))
        put(asyncsplit.backlog, "SMALL_BYTES", 8 * fakes.ROW_BYTES)
        put(asyncsplit.backlog, "GROUP_BYTES", 16 * fakes.ROW_BYTES)
        put(asyncsplit.backlog, "HERE_BYTES", 40 * fakes.ROW_BYTES)
        put(asyncsplit.backlog, "perf_counter", _now)
        put(asyncsplit.feed, "perf_counter", _now)
        put(asyncsplit.stream, "perf_counter", _now)
        put(asyncsplit.waits, "time", SimpleNamespace(monotonic=_now))
        put(asyncsplit.coordinator, "unpack", itemgetter(0))
        put(asyncsplit.coordinator, "gc", SimpleNamespace(freeze=lambda: None))
        put(asyncsplit.distribution, "MAX_SLICES", 3)
        put(asyncsplit.pump, "threading", fakes.PUMP_THREADING)
        put(asyncsplit.guard, "gc", SimpleNamespace(collect=lambda: 0))  # it takes real time
        logger = logging.getLogger("asyncsplit")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        yield


_clock: VirtualLoop | None = None
_actor = ""
_actors = itertools.count()


def new_actor() -> None:
    """Let the next coordinator be another actor, not the last one restarted."""
    global _actor
    _actor = f"actor-{next(_actors)}"


def use_clock(loop: VirtualLoop) -> None:
    """Let this loop say what time it is."""
    global _clock
    _clock = loop


def _now() -> float:
    assert _clock is not None
    return _clock.time()


def simulate(seed: int, *, verbose: bool = False, telemetry: TelemetryConfig = SILENT) -> World:
    """Run the world of a seed, with the fakes installed; raise what is wrong with it."""
    loop = VirtualLoop()
    use_clock(loop)
    new_actor()
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    world = None
    try:

        async def run() -> World:
            nonlocal world
            world = World(seed, loop, verbose=verbose, telemetry=telemetry)
            await world.run()
            return world

        task = loop.create_task(run())
        try:
            loop.run_until_complete(task)
        except BaseException as error:
            if world is not None:
                error.add_note(f"{seed=}: {world.plan}")
                error.add_note(f"at {loop.time():.3f} s: {world.describe()}")
            raise
        assert not unhandled, unhandled[0]
        return task.result()
    finally:
        loop.after_step = lambda: None
        for process in world.workers if world else ():
            process.alive = False  # what lets go of its stream only now has nobody to tell
        for task in asyncio.all_tasks(loop):
            task.cancel()
        with contextlib.suppress(BaseException):
            loop.run_until_complete(asyncio.sleep(0))
        if world is not None:
            world.coordinator._journal.close()
        loop.close()
