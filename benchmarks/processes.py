"""What processes hold, read from ``/proc``; and which process a coordinator is."""

import asyncio
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray


class Held(NamedTuple):
    """Memory in MiB, and threads, of a process."""

    rss_mib: float
    private_mib: float
    """The resident memory without pages of the object store, which stay mapped where they were
    once touched."""
    threads: int


@dataclass
class Peak:
    """The most that was seen of a process."""

    rss_mib: float = 0.0
    threads: int = 0

    def see(self, held: Held) -> None:
        """Take another sample in."""
        self.rss_mib = max(self.rss_mib, held.rss_mib)
        self.threads = max(self.threads, held.threads)


def held(pid: int) -> Held:
    """Measure a process of this machine."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    rss, private = (int(status[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon"))
    return Held(rss, private, int(status["Threads"]))


def coordinator_of(it: Any) -> int:
    """Return the process id of the coordinator behind one of our iterators, or of Ray's."""
    if hasattr(it, "status"):
        return int(asyncio.run(it.status()).pid)
    return int(ray.get(it._coord_actor.__ray_call__.remote(lambda _: os.getpid())))


@contextmanager
def peaks(pids: Mapping[str, int], every_s: float = 0.05) -> Iterator[dict[str, Peak]]:
    """Sample processes in a thread for as long as the context lasts."""
    seen = {name: Peak() for name in pids}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(every_s):
            for name, pid in pids.items():
                seen[name].see(held(pid))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
