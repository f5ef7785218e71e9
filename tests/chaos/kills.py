"""Kill consumers, the dataset's workers and the coordinator, and see what the others get.

The plan of the kills follows from a seed; where exactly they hit does not, so what is checked
holds wherever they do.
"""

import asyncio
import os
import signal
import tempfile
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

import ray

import asyncsplit
from asyncsplit import SplitOptions
from asyncsplit.wire import Status
from tests.chaos.consumers import STOP, Consumer, diary, note_pid
from tests.integration.consume import eventually

ROWS = 1200
BLOCKS = 24
BOUND_S = 60.0
"""How long nothing may come of anything: an epoch takes about a second."""

Victim = Literal["consumer", "worker", "coordinator"]
"""Whose process is killed; a worker is one that executes the dataset."""

VICTIMS: tuple[Victim, ...] = ("consumer", "coordinator", "worker", "consumer")
"""Who is killed, by turns."""


@dataclass(frozen=True)
class Kill:
    """One kill of a plan."""

    victim: Victim
    split: int
    """Whose consumer, or whose progress counts."""
    after_s: float
    """Seconds since the one before."""
    midway: bool
    """Wait for the split to be in the middle of an epoch; else hit whatever it is at."""
    replaced_after_s: float
    """Of a consumer; the rest is Ray's to restart."""


def plan(kills: int, n: int, seed: int) -> list[Kill]:
    """Return the kills of a seed."""
    random = Random(seed)
    return [
        Kill(
            VICTIMS[number % len(VICTIMS)],
            random.randrange(n),
            # Often at once: the one that has just come, or is about to, is killed as well.
            random.choice((0.0, 0.05, random.uniform(0, 1), random.uniform(0, 3))),
            number % 4 == 0 or random.random() < 0.5,
            random.choice((0.0, 0.0, random.uniform(0, 2))),
        )
        for number in range(kills)
    ]


@dataclass
class Report:
    """What came of it."""

    epochs: int = 0
    consumers_killed: int = 0
    workers_killed: int = 0
    coordinators_killed: int = 0
    taken_over: int = 0
    redelivered_rows: int = 0


@dataclass
class Chaos:
    """One job and its kills."""

    n: int
    equal: bool
    seed: int
    kills: int
    say: Callable[[str], None] = lambda _: None
    report: Report = field(default_factory=Report)
    _last: Victim | None = None
    """Who was killed last, workers apart."""
    _running: dict[int, tuple[Any, "ray.ObjectRef[Any]"]] = field(default_factory=dict)
    _incarnations: list[int] = field(default_factory=list)
    _committed: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """For a consumer that was killed: the epoch and its committed rows, shortly before."""

    async def run(self) -> Report:
        """Kill by plan; raise AssertionError for a row that was lost or came once too often."""
        with tempfile.TemporaryDirectory(prefix="asyncsplit-chaos-") as self._directory:
            ds = ray.data.range(ROWS, override_num_blocks=BLOCKS)
            ds = ds.map_batches(note_pid, fn_args=(self._directory,))  # type: ignore[arg-type]
            ds.context.execution_options.preserve_order = True
            options = SplitOptions(coordinator_max_restarts=self.kills)
            self._its = asyncsplit.streaming_split(ds, self.n, equal=self.equal, options=options)
            self._incarnations = [0] * self.n
            self._spares = [_spare() for _ in range(2)]
            try:
                await self._kill_all()
            finally:
                for actor in (*self._spares, *(actor for actor, _ in self._running.values())):
                    ray.kill(actor)
                await self._its[0].shutdown()
            self._check()
        return self.report

    async def _kill_all(self) -> None:
        replacing: dict[int, asyncio.Task[None]] = {}
        for split in range(self.n):
            await self._start(split, 0.0)
        for number, kill in enumerate(plan(self.kills, self.n, self.seed)):
            if kill.victim != "worker":
                await self._until_one_death_is_overcome(kill.victim, replacing)
            await asyncio.sleep(kill.after_s)
            if kill.victim == "worker":
                await self._kill_worker(number)
                continue
            if kill.victim == "consumer" and kill.split in replacing:
                await replacing.pop(kill.split)
            if kill.midway:
                await asyncio.gather(*replacing.values())
                await self._until_midway(kill.split)
            if kill.victim == "coordinator":
                await self._kill_coordinator(number)
                continue
            await self._kill_consumer(number, kill.split)
            replacing[kill.split] = asyncio.create_task(
                self._start(kill.split, kill.replaced_after_s)
            )
        await asyncio.gather(*replacing.values())
        await self._until_all_go_on()
        # Whoever has looked before this was written is at most one epoch on.
        last = (await self._status()).epoch + 2
        path = Path(self._directory, STOP)
        path.with_suffix(".new").write_text(str(last))
        path.with_suffix(".new").rename(path)
        try:
            async with asyncio.timeout(BOUND_S):
                await asyncio.gather(*(run for _, run in self._running.values()))
        except TimeoutError:
            raise AssertionError(f"somebody hangs: {await self._status()}") from None
        self.report.epochs = last + 1

    async def _until_one_death_is_overcome(
        self, victim: Victim, replacing: "dict[int, asyncio.Task[None]]"
    ) -> None:
        """Keep consumers and coordinator from dying together.

        Where a split stands, one of the two must know: the coordinator until a replacement has
        got something, its consumers until a restarted coordinator has heard them. A split of which
        both are gone begins its share anew, which is more than once.
        """
        if self._last is not None and self._last != victim:
            await asyncio.gather(*replacing.values())
            await self._until_all_go_on()
        self._last = victim

    async def _until_all_go_on(self) -> None:
        """Return when all consumers have arrived at the coordinator and finished a batch since."""

        async def opened() -> bool:
            self._fail_early()
            # It opens the epoch when all have said where they stand.
            return (await self._status()).epoch >= 0

        await self._in_time(opened)
        before = list(map(self._finished, range(self.n)))

        async def gone_on() -> bool:
            self._fail_early()
            return all(self._finished(split) > rows for split, rows in enumerate(before))

        await self._in_time(gone_on)

    def _finished(self, split: int) -> int:
        """Return how many batches a split's consumer of now has finished."""
        entries = diary(self._directory, split, self._incarnations[split])
        return sum("finished" in entry for entry in entries)

    async def _in_time(self, condition: Callable[[], Awaitable[bool]]) -> None:
        try:
            await eventually(condition, BOUND_S)
        except TimeoutError:
            raise AssertionError(f"somebody hangs: {await self._status()}") from None

    async def _start(self, split: int, after_s: float) -> None:
        await asyncio.sleep(after_s)
        actor = self._spares.pop(0)
        self._spares.append(_spare())
        run = actor.run.remote(
            self._its[split], self._directory, self._incarnations[split], step_s=0.01
        )
        self._running[split] = actor, run

    async def _kill_consumer(self, number: int, split: int) -> None:
        actor, _ = self._running[split]
        pid = await actor.pid.remote()
        status = await self._status()
        self._fail_early()
        os.kill(pid, signal.SIGKILL)
        del self._running[split]
        incarnation = self._incarnations[split]
        self._committed[split, incarnation] = status.epoch, status.committed_rows[split]
        self._incarnations[split] += 1
        self.report.consumers_killed += 1
        self.say(
            f"{number}: killed consumer {incarnation} of split {split} in epoch {status.epoch}"
            f" ({status.phase}), {status.committed_rows[split]} rows committed"
        )

    async def _kill_coordinator(self, number: int) -> None:
        status = await self._status()
        self._fail_early()
        os.kill(status.pid, signal.SIGKILL)
        self.report.coordinators_killed += 1
        self.say(
            f"{number}: killed coordinator {status.pid} in epoch {status.epoch} ({status.phase}),"
            f" {status.committed_rows} rows committed"
        )

    async def _until_midway(self, split: int) -> None:
        async def midway() -> bool:
            self._fail_early()
            committed = (await self._status()).committed_rows[split]
            return 0 < committed < ROWS // self.n

        await self._in_time(midway)

    async def _kill_worker(self, number: int) -> None:
        async def known() -> bool:
            return any(map(_is_worker, self._workers()))

        await self._in_time(known)
        alive = sorted(filter(_is_worker, self._workers()))
        pid = Random(self.seed + number).choice(alive)
        os.kill(pid, signal.SIGKILL)
        self.report.workers_killed += 1
        self.say(f"{number}: killed worker {pid} of the dataset")

    def _fail_early(self) -> None:
        """Raise what a consumer that should be running has raised."""
        done, _ = ray.wait([run for _, run in self._running.values()], timeout=0)
        if done:
            ray.get(done)
            raise AssertionError("a consumer stopped before it was told to")

    def _workers(self) -> Iterator[int]:
        for path in Path(self._directory).glob("worker-*"):
            yield int(path.name.removeprefix("worker-"))

    async def _status(self) -> Status:
        return await self._its[0].status()

    def _check(self) -> None:
        """Put each split's epochs together from what all its consumers wrote."""
        shares: dict[int, list[list[int]]] = defaultdict(lambda: [[] for _ in range(self.n)])
        for split in range(self.n):
            for incarnation in range(self._incarnations[split] + 1):
                self._follow(shares, split, incarnation)
        assert sorted(shares) == list(range(self.report.epochs))
        for epoch, parts in shares.items():
            rows = sorted(row for part in parts for row in part)
            if self.equal:
                assert {len(part) for part in parts} == {ROWS // self.n}, f"{epoch=}"
                assert len(set(rows)) == len(rows), f"{epoch=}: rows came to two splits"
                assert set(rows) <= set(range(ROWS))
            else:
                assert rows == list(range(ROWS)), f"{epoch=}: rows are missing or came twice"
            assert all(part == sorted(part) for part in parts), f"{epoch=} is out of order"

    def _follow(self, shares: dict[int, list[list[int]]], split: int, incarnation: int) -> None:
        """Let one consumer go on with what those before it have finished with."""
        began: set[int] = set()
        for entry in diary(self._directory, split, incarnation):
            if "ids" not in entry:
                continue
            epoch, ids = entry["epoch"], entry["ids"]
            rows = shares[epoch][split]
            if epoch not in began and rows:
                place = rows.index(ids[0]) if ids[0] in rows else len(rows)
                before, committed = self._committed[split, incarnation - 1]
                assert before < epoch or place >= committed, (
                    f"split {split} of {epoch=} begins again at row {place} of {committed}"
                )
                self.report.taken_over += 1
                self.report.redelivered_rows += len(rows) - place
                del rows[place:]
            began.add(epoch)
            rows += ids


def _spare() -> Any:
    """Start the process of a consumer to come: a replacement is there sooner than the news."""
    return ray.remote(Consumer).options(num_cpus=0).remote()


def _is_worker(pid: int) -> bool:
    try:
        return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
