"""One coordinator for many epochs, left by its consumers in every way there is."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np
import ray

import asyncsplit
from asyncsplit import AsyncDataIterator
from tests.integration.consume import eventually, stopped
from tests.soak.measure import Held, Sample, held, store_mb

N = 2
BLOCKS = 12
ROWS_PER_BLOCK = 10
ROWS = BLOCKS * ROWS_PER_BLOCK
ROW_BYTES = (100, 30_000)
"""Blocks by turns: some travel in messages, those over 100 KB through the object store."""

BOUND_S = 60.0
"""How long an epoch may take before somebody hangs; it takes half a second, with a kill three."""

Way = Literal["read", "cancel", "break", "close", "drop", "raise", "die"]
"""How a consumer reads an epoch. ``cancel`` and ``die`` read it to the end as well."""


@dataclass(frozen=True)
class Plan:
    """What happens in one epoch."""

    ways: tuple[Way, ...]
    after: int
    """Batches after which whoever leaves or dies does so."""
    batch_size: int | None
    prefetch_batches: int
    seed: int
    """For when a wait is cancelled."""


def plan(epochs: int, seed: int) -> list[Plan]:
    """Return the plan of a seed: three epochs of four are read plainly, 3 % have a kill."""
    random = Random(seed)
    return [_plan_epoch(random) for _ in range(epochs)]


def _plan_epoch(random: Random) -> Plan:
    kind = random.random()
    leave: tuple[Way, ...] = ("break", "close", "drop", "raise")
    ways: list[Way] = ["read"] * N
    if kind < 0.03:
        # The other split's consumer lives as long as the job: it is measured.
        ways = [random.choice(("read", "cancel", *leave)), "die"]
    elif kind < 0.06:
        ways = [random.choice(leave)] * N
    elif kind < 0.25:
        ways[random.randrange(N)] = random.choice(("cancel", *leave))
    return Plan(
        tuple(ways),
        after=random.randint(1, 3),
        batch_size=random.choice((7, 20, None)),
        prefetch_batches=random.choice((0, 1)),
        seed=random.randrange(2**32),
    )


class Share(NamedTuple):
    """What a consumer got of an epoch."""

    epoch: int | None
    ids: list[int]
    whole: bool
    """Whether it read to the end."""


class Reader:
    """Consumes one split in a process of its own."""

    def __init__(self, it: AsyncDataIterator) -> None:
        self._it = it
        self._begun: Any = None

    def pid(self) -> int:
        return os.getpid()

    def held(self) -> Held:
        return held(self._it)

    async def begin(self, plan: Plan) -> list[int]:
        """Read some batches of an epoch and stay there."""
        self._begun = self._stream(plan)
        return [i for _ in range(plan.after) for i in (await anext(self._begun))["id"].tolist()]

    async def read(self, way: Way, plan: Plan) -> Share:
        """Read an epoch, or the beginning of it."""
        stream = self._stream(plan)
        ids: list[int] = []
        whole = True
        if way in ("read", "cancel"):
            random = Random(plan.seed)
            while not await self._read_for(stream, ids, random if way == "cancel" else None):
                pass
        elif way == "close":
            async with stream:
                whole = await self._read_some(stream, ids, plan.after)
        else:
            try:
                whole = await self._read_some(stream, ids, plan.after, raises=way == "raise")
            except LookupError:
                whole = False
        return Share(stream.statistics().epoch, ids, whole)

    def _stream(self, plan: Plan) -> Any:
        return self._it.iter_batches(
            batch_size=plan.batch_size, prefetch_batches=plan.prefetch_batches
        )

    async def _read_for(self, stream: Any, ids: list[int], random: Random | None) -> bool:
        """Read to the end or until cancelled, which it is soon; return whether it was not."""
        try:
            async with asyncio.timeout(random.uniform(0, 0.05) if random else None):
                while (batch := await anext(stream, None)) is not None:
                    ids += batch["id"].tolist()
                    await asyncio.sleep(0)
        except TimeoutError:
            return False
        return True

    async def _read_some(
        self, stream: Any, ids: list[int], after: int, *, raises: bool = False
    ) -> bool:
        async for batch in stream:
            ids += batch["id"].tolist()
            after -= 1
            if raises and not after:
                raise LookupError(batch)
            if not after:
                return False
        return True


@dataclass
class Soak:
    """One job."""

    epochs: int
    seed: int
    sample_every: int = 10
    say: Callable[[str], None] = lambda _: None
    samples: list[Sample] = field(default_factory=list)
    kills: int = 0
    whole: int = 0
    """Epochs that all splits have read to the end."""
    redelivered_rows: int = 0
    _readers: list[Any] = field(default_factory=list)
    _spare: Any = None

    async def run(self) -> None:
        """Read all epochs; raise AssertionError for a row lost or delivered twice."""
        began = time.monotonic()
        ds = ray.data.range(ROWS, override_num_blocks=BLOCKS).map_batches(_payload)
        self._its = asyncsplit.streaming_split(ds, N)
        self._readers = [_reader(it) for it in self._its]
        self._spare = _reader(self._its[-1])
        try:
            for number, plan_ in enumerate(plan(self.epochs, self.seed)):
                try:
                    async with asyncio.timeout(BOUND_S):
                        await self._epoch(number, plan_)
                except (AssertionError, TimeoutError) as error:
                    status = await self._its[0].status()
                    raise AssertionError(f"epoch {number}, {plan_}: {error}; {status}") from error
                if (number + 1) % self.sample_every == 0:
                    self.samples.append(await self._sample(number + 1, time.monotonic() - began))
                    self.say(_line(self.samples[-1]))
        finally:
            for actor in (*self._readers, self._spare):
                ray.kill(actor)
            await self._its[0].shutdown()

    async def _epoch(self, number: int, plan: Plan) -> None:
        shares: list[Share] = await asyncio.gather(
            *(self._read(split, way, plan) for split, way in enumerate(plan.ways))
        )
        ids = [i for share in shares for i in share.ids]
        assert {share.epoch for share in shares} == {number}, shares
        if all(share.whole for share in shares):
            assert sorted(ids) == list(range(ROWS)), "rows are missing or came twice"
            self.whole += 1
        assert len(set(ids)) == len(ids), "rows came twice"
        assert set(ids) <= set(range(ROWS))
        for share in shares:
            assert not share.whole or len(share.ids) == ROWS // N, "a share is not what it was"

    async def _read(self, split: int, way: Way, plan: Plan) -> Share:
        if way == "die":
            return await self._replace(split, plan)
        share: Share = await self._readers[split].read.remote(way, plan)
        return share

    async def _replace(self, split: int, plan: Plan) -> Share:
        """Have a split read by one consumer that is killed, and by another to the end."""
        victim = self._readers[split]
        pid = await victim.pid.remote()
        ids = await victim.begin.remote(plan)
        committed = (await self._its[0].status()).committed_rows[split]
        os.kill(pid, signal.SIGKILL)
        self.kills += 1
        self._readers[split], self._spare = self._spare, _reader(self._its[split])
        rest: Share = await self._readers[split].read.remote("read", plan)
        kept = ids[: ROWS // N - len(rest.ids)]
        assert len(kept) >= committed, f"{committed} rows were committed, {len(kept)} are kept"
        self.redelivered_rows += len(ids) - len(kept)
        return Share(rest.epoch, kept + rest.ids, whole=True)

    async def _sample(self, epoch: int, seconds: float) -> Sample:
        # Who has dropped a stream does not wait for the coordinator to know.
        await eventually(lambda: stopped(self._its[0]))
        coordinator: Any = self._its[0]._consumer.coordinator
        consumer = await self._readers[0].held.remote()
        return Sample(
            epoch,
            seconds,
            self.kills,
            # A method of every Ray actor: runs a function on it, here in another thread.
            coordinator=await coordinator.__ray_call__.remote(held),
            consumer=consumer,
            driver=held(self._its),
            store_mb=await _settled_store_mb(),
        )


async def _settled_store_mb() -> float:
    """Return the least of half a second: what has been let go of shows a little later."""
    seen = []
    for _ in range(4):
        await asyncio.sleep(0.12)
        seen.append(store_mb())
    return min(seen)


def _payload(batch: Any) -> Any:
    first = int(batch["id"][0]) // ROWS_PER_BLOCK
    size = ROW_BYTES[first % len(ROW_BYTES)]
    batch["payload"] = np.array([bytes(size)] * len(batch["id"]), dtype=object)
    return batch


def _reader(it: AsyncDataIterator) -> Any:
    return ray.remote(Reader).options(num_cpus=0).remote(it)


def _line(sample: Sample) -> str:
    def show(held: Held) -> str:
        return (
            f"{held.memory_mb:.1f} MB, {held.threads} threads, {held.fds} fds, {held.tasks} tasks,"
            f" {held.own_objects} own objects, {held.items} items"
        )

    return (
        f"epoch {sample.epoch}, {sample.kills} kills, store {sample.store_mb:.2f} MB |"
        f" coordinator {show(sample.coordinator)} | consumer {show(sample.consumer)} |"
        f" driver {show(sample.driver)}"
    )
