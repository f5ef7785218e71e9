"""What a process holds, and whether it comes to hold more and more."""

import asyncio
import gc
import os
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import ray

from asyncsplit.core.epochs import KEPT


@dataclass(frozen=True)
class Held:
    """What one process holds, after a garbage collection."""

    memory_mb: float
    """Anonymous memory: the resident set less the shared pages of the object store, which stay
    mapped where they were once touched."""
    threads: int
    fds: int
    objects: int
    """Objects the garbage collector tracks."""
    own_objects: int
    """Those of them that are instances of asyncsplit's classes."""
    tasks: int
    """asyncio tasks that are not done."""
    containers: dict[str, int]
    """How many items there are in each container that an object of asyncsplit's holds."""

    @property
    def items(self) -> int:
        """Items of all containers."""
        return sum(self.containers.values())


@dataclass(frozen=True)
class Sample:
    """What all processes of a job hold between two epochs."""

    epoch: int
    seconds: float
    kills: int
    coordinator: Held
    consumer: Held
    """The one that lives as long as the job."""
    driver: Held
    store_mb: float
    """Object store memory in use; what Ray keeps of the last execution is in it."""


def held(root: Any) -> Held:
    """Measure this process, and the containers within reach of an object."""
    # Ray Data's executors are cycles: they, and what they hold in the object store, go with these.
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    objects = gc.get_objects()
    return Held(
        memory_mb=int(status["RssAnon"].split()[0]) / 1024,
        threads=int(status["Threads"]),
        fds=len(os.listdir("/proc/self/fd")),
        objects=len(objects),
        own_objects=sum(map(_is_own, objects)),
        # Not isinstance: it asks for the class, and an object of PyTorch's answers with a warning.
        tasks=sum(issubclass(type(it), asyncio.Task) and not it.done() for it in objects),
        containers=dict(_containers(root)),
    )


def store_mb() -> float:
    """Return how much of the object store is in use."""
    name = "object_store_memory"
    used: float = ray.cluster_resources()[name] - ray.available_resources().get(name, 0.0)
    return used / 1e6


def _containers(root: Any) -> Counter[str]:
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [(type(root).__name__, root)]
    while todo:
        path, it = todo.pop()
        if id(it) in seen:
            continue
        seen.add(id(it))
        if isinstance(it, dict | set | list | deque):
            sizes[path] += len(it)
            todo += ((f"{path}[]", item) for item in (it.values() if isinstance(it, dict) else it))
        elif _is_own(it):
            todo += (
                (f"{path}.{name}", value) for name, value in getattr(it, "__dict__", {}).items()
            )
    return sizes


def _is_own(it: Any) -> bool:
    return str(type(it).__module__).partition(".")[0] == "asyncsplit"


class Growth(NamedTuple):
    """How a figure has changed from early in a run to its end."""

    figure: str
    early: float
    late: float
    allowed: float
    """What ``late`` may be."""

    @property
    def excessive(self) -> bool:
        return self.late > self.allowed


class _Bound(NamedTuple):
    noise: float
    per_epoch: float = 0.0
    """What Ray itself adds: the same loop over Ray's own splits does."""


EXACT = {
    # Ray's pools start a thread or open a connection when first needed, which can be late.
    "threads": _Bound(3),
    "fds": _Bound(3),
    "tasks": _Bound(2),
    "own_objects": _Bound(30),
    # For each of two splits the coordinator remembers the last four dead, and four closed streams.
    "items": _Bound(4 + 2 * 2 * KEPT),
}
"""Bounds of what is counted, for any process."""

MEMORY = {
    # Ray Data makes a class of an actor and remote functions anew for each execution and keeps
    # them: 130 objects and 0.06 to 0.09 MB, the same in the coordinator of Ray's own splits.
    "coordinator": _Bound(10, per_epoch=0.09),
    "consumer": _Bound(10, per_epoch=0.01),
    "driver": _Bound(10, per_epoch=0.01),
}

STORE_MB = _Bound(0.5)
"""Less than two of the larger blocks."""


def growth(samples: Sequence[Sample], *, memory: bool = True) -> Iterator[Growth]:
    """Compare medians early and late in a run: of the samples around 5 to 15 %, and the last 10 %.

    Not before the tenth epoch, by when everything has been in use once.
    """
    last = samples[-1].epoch
    early = [it for it in samples if max(10, 0.05 * last) <= it.epoch <= max(15, 0.15 * last)]
    late = [it for it in samples if it.epoch >= 0.9 * last]
    epochs = statistics.median(it.epoch for it in late) - statistics.median(
        it.epoch for it in early
    )

    def compare(name: str, figure: Callable[[Sample], float], bound: _Bound) -> Growth:
        before, after = (statistics.median(map(figure, window)) for window in (early, late))
        return Growth(name, before, after, before + bound.noise + bound.per_epoch * epochs)

    for process in ("coordinator", "consumer", "driver"):
        for name, bound in EXACT.items():
            yield compare(f"{process} {name}", attrgetter(f"{process}.{name}"), bound)
        if memory:
            figure = attrgetter(f"{process}.memory_mb")
            yield compare(f"{process} memory_mb", figure, MEMORY[process])
    yield compare("store_mb", attrgetter("store_mb"), STORE_MB)
