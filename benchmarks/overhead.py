"""What metrics, traces, leases and acknowledgements cost: with them and without."""

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import Dataset

import asyncsplit
from asyncsplit import SplitOptions, TelemetryConfig
from asyncsplit.core import ledger
from asyncsplit.core.liveness import Liveness
from asyncsplit.core.progress import Progress, Reading
from asyncsplit.feed import Feed
from asyncsplit.lifeline import Lifelines
from benchmarks.harness import OURS, Bench, Figure, Round, Target, close, table_blocks, values
from benchmarks.worker import Job

ON, OFF = "on", "off"
SAMPLE_RATIO = 0.1
SAMPLED = f"{SAMPLE_RATIO:.0%} sampled"


def turn_off(_: object) -> None:
    """Keep no account, in this process, of what consumers have finished with, nor watch them."""

    async def return_at_once(*_: object) -> bool:
        return False

    def nothing(*_: object) -> None:
        pass

    def begin(reading: Reading, rows: int) -> int:
        reading.fed += 1
        return 0

    off: list[tuple[Any, str, Any]] = [
        (Reading, "begin", begin),
        # What is begun counts as finished: the coordinator forgets it.
        (Reading, "progress", lambda reading, *_: Progress(0, reading.fed, reading.fed)),
        (Feed, "acknowledge", nothing),
        (Lifelines, "hold", return_at_once),
        (Lifelines, "watch", return_at_once),
        (Liveness, "hear", nothing),
        (ledger, "fingerprint", lambda before, rows: 0),
    ]
    for owner, name, instead in off:
        setattr(owner, name, instead)


@dataclass
class Setting:
    """A dataset, and how it is read."""

    name: str
    ds: Dataset
    n: int
    job: Job


def telemetry(bench: Bench) -> list[Figure]:
    """Return what the metrics cost when nobody looks at them, and traces with their receiver."""
    off = SplitOptions(telemetry=TelemetryConfig(enabled=False))
    figures = []
    for setting in _settings(bench):
        its = {
            ON: asyncsplit.streaming_split(setting.ds, setting.n),
            OFF: asyncsplit.streaming_split(setting.ds, setting.n, options=off),
        }
        what = "the metrics endpoint, which nobody scrapes"
        sides = {side: (bench, its[side]) for side in its}
        target = Target(ON, OFF, at_most=1.02)
        figures.append(_compare(bench, setting, "telemetry", what, sides, [target]))
    return [*figures, *_traces(Bench(quick=bench.quick))]


def _traces(bench: Bench) -> list[Figure]:
    """Return what traces cost; in processes that serve nothing else, as they keep what sends."""
    figures = []
    with _receiver() as receiver:
        url = f"http://127.0.0.1:{receiver.server_address[1]}/v1/traces"
        asked = {OFF: {}, SAMPLED: {"trace_sample_ratio": SAMPLE_RATIO}, ON: {}}
        for setting in _settings(bench):
            its = {}
            for side, config in asked.items():
                endpoint = None if side == OFF else url
                options = TelemetryConfig(otlp_traces_endpoint=endpoint, **config)
                its[side] = asyncsplit.streaming_split(
                    setting.ds, setting.n, options=SplitOptions(telemetry=options)
                )
            what = f"traces, sent to a receiver on this machine: all epochs, or {SAMPLED}"
            sides = {side: (bench, its[side]) for side in its}
            targets = [Target(ON, OFF, at_most=1.05), Target(SAMPLED, OFF, at_most=1.02)]
            figures.append(_compare(bench, setting, "traces", what, sides, targets))
    return figures


class _Receiver(http.server.ThreadingHTTPServer):
    """Takes what is sent, and counts its bytes only."""

    received_bytes = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, _Receiver)
        self.server.received_bytes += len(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def _receiver() -> Iterator[_Receiver]:
    """Receive spans, on threads of this process.

    Raises:
        AssertionError: If none has come in the end: nothing was measured then.
    """
    with _Receiver(("127.0.0.1", 0), _Handler) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield receiver
        receiver.shutdown()
    if not receiver.received_bytes:
        raise AssertionError("no spans have arrived")


def leases(bench: Bench) -> list[Figure]:
    """Return what leases and acknowledgements cost; on and off in processes of their own."""
    without = Bench(quick=bench.quick)
    ray.get([worker.__ray_call__.remote(turn_off) for worker in without.workers(2)])
    figures = []
    for setting in _settings(bench):
        its = {side: asyncsplit.streaming_split(setting.ds, setting.n) for side in (ON, OFF)}
        ray.get(its[OFF][0]._consumer.coordinator.__ray_call__.remote(turn_off))
        what = "leases, acknowledgements and lifelines"
        sides = {ON: (bench, its[ON]), OFF: (without, its[OFF])}
        target = Target(ON, OFF, at_most=1.05)
        figures.append(_compare(bench, setting, "leases", what, sides, [target]))
    return figures


def _settings(bench: Bench) -> Iterator[Setting]:
    """Yield the datasets of workloads `batches` and `blocks`."""
    kwargs = {"batch_size": 256, "batch_format": "numpy"}
    yield Setting("batches", table_blocks(16, 125_000, 4), 2, Job(kwargs))
    if not bench.quick:
        yield Setting("blocks", table_blocks(2_000, 100, 4), 1, Job({**kwargs, "batch_size": None}))


def _compare(
    bench: Bench,
    setting: Setting,
    name: str,
    what: str,
    sides: dict[str, tuple[Bench, Sequence[Any]]],
    targets: Sequence[Target],
) -> Figure:
    turns: dict[str, Callable[[], Round]] = {
        side: lambda where=where, its=its: where.consume(OURS, its, setting.job)  # type: ignore[misc]
        for side, (where, its) in sides.items()
    }
    bench.take_turns(turns, 2)
    rounds = bench.take_turns(turns, bench.pick(25, 3), rows=setting.ds.count())
    for _, its in sides.values():
        close({OURS: its})
    return Figure(
        f"{name}-{setting.name}",
        f"the whole epoch of workload `{setting.name}` with and without {what}",
        "ms",
        "only one side has it",
        values(rounds, lambda turn: turn.epoch_ms),
        targets,
    )
