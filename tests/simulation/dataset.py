"""Stands for Ray Data: a dataset, its executions, blocks on their way, and the pump's thread."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from asyncsplit.engine import Block, Bundle
from asyncsplit.pump import Pump

ROW_BYTES = 8

BUNDLE_BLOCKS = (0, 1, 1, 1, 2, 3)
"""How many blocks a bundle has, drawn from these."""


class DatasetError(Exception):
    """What the dataset's own code raises."""


class Context:
    """Stands for a `DataContext`."""

    def __init__(self, preserve_order: bool) -> None:
        self.execution_options = SimpleNamespace(preserve_order=preserve_order)

    def copy(self) -> "Context":
        return self


class Ref:
    """Stands for a reference to a block: the block is elsewhere until somebody asks for it."""

    def __init__(self, ids: range, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self.ids = ids
        self._loop = loop
        self._seconds = seconds
        self._here: Future[Any] | None = None

    def future(self) -> "Future[Any]":
        """Fetch it."""
        if self._here is None:
            self._here = Future()
            if self._seconds:
                self._loop.call_later(self._seconds, self._arrive)
            else:
                self._arrive()
        return self._here

    @property
    def is_sent_for(self) -> bool:
        """Whether somebody has asked for it."""
        return self._here is not None

    def _arrive(self) -> None:
        assert self._here is not None
        self._here.set_result(pa.table({"id": pa.array(self.ids, pa.int64())}))


def wait(
    refs: Sequence[Ref], *, num_returns: int, timeout: float, fetch_local: bool
) -> tuple[list[Ref], list[Ref]]:
    """Stand for `ray.wait` as the feed calls it."""
    assert (num_returns, timeout, fetch_local) == (len(refs), 0, True)
    assert len(set(refs)) == len(refs), "Ray refuses a reference given twice"
    here = [ref for ref in refs if ref.future().done()]
    return here, [ref for ref in refs if ref not in here]


def get_packed(refs: Sequence[Ref]) -> list[Ref] | None:
    """Stand for `engine.get_packed`."""
    return list(refs) if all(ref.future().done() for ref in refs) else None


def pickled(packed: Ref) -> None:
    """Stand for `engine.pickled`: blocks here are not."""


def unpack(packed: Ref) -> Any:
    """Stand for `engine.unpack`."""
    return packed.future().result(timeout=0)


@dataclass
class FakeDataset:
    """Rows 0 to ``rows``, produced in blocks cut anew for each execution."""

    rows: int
    loop: asyncio.AbstractEventLoop
    random: Random
    failures: dict[int, str] = field(default_factory=dict)
    """For an epoch, whether its ``"start"`` fails or its ``"blocks"`` do."""
    slow_start_s: float = 0.0
    largest_block_rows: int = 12
    slow_block_s: float = 0.2
    name = "simulated"
    context: Context = field(default_factory=lambda: Context(preserve_order=True))
    running: "FakeExecution | None" = None
    pumps: "list[PumpThread]" = field(default_factory=list)

    def schema(self) -> pa.Schema:
        """Execute a part to find out, as `Dataset.schema` may have to."""
        # One that is not shut down may have actors that hold the CPUs.
        assert self.running is None or self.running._shut, "two executors at a time"
        return pa.schema([("id", pa.int64())])

    @property
    def is_idle(self) -> bool:
        """Whether nothing is executed."""
        return self.running is None or self.running.is_over

    @property
    def largest_bundle_bytes(self) -> int:
        """What the pump may take beyond its credit."""
        return max(BUNDLE_BLOCKS) * self.largest_block_rows * ROW_BYTES

    def seconds_of(self, func: Callable[..., Any], *args: object) -> float:
        """Return how long a blocking call takes: a start as long as actors take to come up."""
        longest = self.slow_start_s if func == FakeExecution.start else 0.1
        return self.random.uniform(0.0, longest)

    def bundles(self, epoch: int) -> Iterator[Bundle]:
        """Produce one epoch."""
        fails_after = self.random.randrange(self.rows) if epoch in self.failures else None
        first = 0
        while first < self.rows:
            if fails_after is not None and first >= fails_after:
                raise DatasetError(epoch)
            bundle = []
            for _ in range(self.random.choice(BUNDLE_BLOCKS)):
                rows = min(self.random.randint(1, self.largest_block_rows), self.rows - first)
                before = self.random.choice((0, 0, 0, 3))
                slow = self.random.random() < 0.3
                ref = Ref(
                    range(first - before, first + rows + before),
                    self.loop,
                    self.random.uniform(0.001, self.slow_block_s) if slow else 0.0,
                )
                size = rows * ROW_BYTES
                node_id = (None, "node", "another node")[first % 3]
                bundle.append(Block(ref, before, before + rows, size, node_id))  # type: ignore[arg-type]
                first += rows
                if first == self.rows:
                    break
            yield Bundle(tuple(bundle), None)
        if fails_after is not None:
            raise DatasetError(epoch)


class FakeExecution:
    """Stands for an `engine.Execution`; one at a time, or a real cluster could deadlock."""

    def __init__(self, dataset: FakeDataset, epoch: int) -> None:
        self._bundles = dataset.bundles(epoch)
        self.dataset = dataset
        self.epoch = epoch
        self.is_over = False
        """Whether it was shut down, or has come to its end."""
        self._shut = False
        self._rows = 0
        self._is_late = dataset.random.random() < 0.5
        self.has_output = False

    @classmethod
    def start(cls, dataset: FakeDataset, epoch: int) -> "FakeExecution":
        """Start, if no other one runs."""
        assert dataset.running is None or dataset.running._shut, "two executors at a time"
        if dataset.failures.get(epoch) == "start":
            raise DatasetError(epoch)
        dataset.running = cls(dataset, epoch)
        return dataset.running

    def next_bundle(self) -> Bundle:
        """Return the next one, of which nobody has to wait for here: see `PumpThread`."""
        if self._shut:
            raise StopIteration
        try:
            bundle = next(self._bundles)
        except StopIteration:
            self.is_over = True
            raise
        self._rows += sum(block.stop - block.start for block in bundle.blocks)
        self.has_output = self._rows < self.dataset.rows and self.dataset.random.random() < 0.5
        return bundle

    def ends_here(self) -> bool:
        """Tell whether no bundle comes any more, if that is known: half of the time it is late."""
        fails = self.dataset.failures.get(self.epoch) == "blocks"
        self.is_over |= self._rows == self.dataset.rows and not fails and not self._is_late
        return self.is_over

    def report_consumers(self, held_bytes: int, *, wanting: bool) -> None:
        assert held_bytes >= 0

    def excuse_pause(self) -> None:
        pass

    def finish(self) -> None:
        assert self.is_over
        self._shut = True

    def shutdown(self) -> None:
        self._shut = self.is_over = True

    def stats(self) -> str:
        return ""

    def seconds_to_next(self) -> float:
        random = self.dataset.random
        if self.has_output:
            return 0.0
        return random.uniform(0.0, 0.02) if random.random() < 0.9 else random.uniform(0.0, 3.0)


class PumpThread:
    """Stands for the pump's thread: takes the same steps as `Pump._run`, as timers."""

    def __init__(
        self, *, target: Callable[..., None], args: tuple[object], name: str, daemon: bool
    ) -> None:
        pump = target.__self__  # type: ignore[attr-defined]
        assert isinstance(pump, Pump)
        self._pump = pump
        self._loop = asyncio.get_running_loop()
        self._busy = False
        self._ended = False
        (execution,) = args
        assert isinstance(execution, FakeExecution)
        self.execution: FakeExecution = execution
        execution.dataset.pumps.append(self)

    @property
    def ended(self) -> bool:
        """Whether the thread has ended, or would as soon as it ran."""
        return self._ended or self._pump._stopped

    def start(self) -> None:
        condition = self._pump._condition
        assert isinstance(condition, _Condition)
        condition.notified = self.step
        self.step()

    def join(self) -> None:
        """Return: there is nothing to wait for in virtual time."""

    def step(self) -> None:
        """Begin to wait for a bundle, if the pump may."""
        if self._busy or self._ended or self._pump._stopped:
            return
        if self._pump._credit <= 0:
            self._pump._deliver_soon()
            return
        self._busy = True
        self._loop.call_later(self.execution.seconds_to_next(), self._take)

    def _take(self) -> None:
        self._busy = False
        if self._pump._take(self.execution):  # type: ignore[arg-type]
            self.step()
        else:
            self._ended = True


class _Condition(threading.Condition):
    notified: Callable[[], None] | None = None

    def notify(self, n: int = 1) -> None:
        super().notify(n)
        if self.notified is not None:
            asyncio.get_running_loop().call_soon(self.notified)


PUMP_THREADING = SimpleNamespace(Condition=_Condition, Thread=PumpThread)
