"""What `asyncsplit top` computes from scrapes, and what it says when there is nothing to scrape."""

import contextlib
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from asyncsplit import cli
from asyncsplit.core.epochs import Epochs, Phase, Stream
from asyncsplit.options import TelemetryConfig
from asyncsplit.telemetry import scrape, top, troubles, watch
from asyncsplit.telemetry.catalog import CATALOG, MAX_SPLIT_LABELS, WORST
from asyncsplit.telemetry.collector import StateCollector
from asyncsplit.telemetry.counters import ConsumerCounters
from asyncsplit.telemetry.endpoint import Endpoint
from asyncsplit.telemetry.present import SORT_KEYS, WINDOW_S, History, Scrape, SortKey, present
from asyncsplit.telemetry.scrape import Samples
from asyncsplit.telemetry.state import CoordinatorState
from asyncsplit.telemetry.verdict import verdict
from asyncsplit.telemetry.watch import PATIENCE_S, Watch


def scraped(state: CoordinatorState, at: float = 0.0) -> Scrape:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(StateCollector(state))
    return Scrape(at, Samples.parse(generate_latest(registry).decode()))


def heard(state: CoordinatorState, split: int, counters: ConsumerCounters) -> None:
    state.meet(split, f"consumer {split}", 700)
    state.update(split, f"consumer {split}", counters)


def test_rates_and_shares_are_of_the_time_between_the_scrapes() -> None:
    state = CoordinatorState.of("id", 2, "flights")
    heard(state, 0, ConsumerCounters(rows=100, wait_s=1.0, data_s=1.0, stream_s=2.0))
    before = scraped(state, 10.0)
    heard(state, 0, ConsumerCounters(rows=300, bytes=64, wait_s=2.0, data_s=1.5, stream_s=6.0))
    now = present(before, scraped(state, 14.0))

    assert (now.dataset, now.splits, now.epoch, now.phase) == ("flights", 2, -1, "waiting")
    assert (now.rows_per_s, now.bytes_per_s, now.stall) == (50, 16, 0.25)
    assert now.causes == {"barrier": 0, "data": 0.125, "transfer": 0, "conversion": 0.125}
    assert [(row.split, row.rows_per_s, row.stall) for row in now.rows] == [
        (0, 50, 0.25),
        (1, 0, None),
    ]


def test_one_scrape_has_no_rates() -> None:
    state = CoordinatorState.of("id", 1)
    heard(state, 0, ConsumerCounters(rows=100, stream_s=2.0))
    only = scraped(state)
    now = present(only, only)
    assert (now.rows_per_s, now.stall, now.rows[0].rows_per_s) == (None, None, None)


def test_rates_are_of_the_latest_seconds_and_begin_anew_with_the_process() -> None:
    state = CoordinatorState.of("id", 1)
    history = History()
    for at in range(30):
        heard(state, 0, ConsumerCounters(rows=at**2))
        assert (history.add(scraped(state, float(at))) is None) == (at == 0)
    assert history.present().rows_per_s == (29**2 - (29 - WINDOW_S) ** 2) / WINDOW_S

    restarted = CoordinatorState.of("id", 1)
    restarted.started_at = state.started_at + 1
    assert history.add(scraped(restarted, 30.0)) is None
    assert history.present().rows_per_s is None


def test_states_tell_who_reads_who_waits_and_who_is_missing() -> None:
    state = CoordinatorState.of("id", 3)
    state.epochs_now = epochs = Epochs(3)
    epochs.arrived[1] = Stream("b", 0)
    state.arrived_at = {1: 0.0}
    only = scraped(state)
    now = present(only, only)
    assert [row.state for row in now.rows] == ["missing", "waiting", "missing"]
    assert (now.missing, now.missing_text) == ((0, 2), "2 of 3 splits: 0, 2")

    state.epochs_now = epochs = Epochs(3, 0, Phase.RUNNING)
    epochs.active[2] = Stream("c", 0)
    only = scraped(state)
    assert [row.state for row in present(only, only).rows] == ["done", "done", "reading"]


def test_of_many_splits_the_worst_are_shown_and_all_are_summed() -> None:
    state = CoordinatorState.of("id", MAX_SPLIT_LABELS + 6)
    before = scraped(state, 0.0)
    for split in range(MAX_SPLIT_LABELS + 6):
        heard(state, split, ConsumerCounters(rows=10, wait_s=split, stream_s=100.0, lag_s=split))
    after = scraped(state, 1.0)
    for sort in SORT_KEYS:
        now = present(before, after, sort)
        assert now.rows_per_s == 10 * (MAX_SPLIT_LABELS + 6)
        assert len(now.rows) == WORST
    worst = [row.split for row in present(before, after, "lag").rows]
    assert worst == [*range(MAX_SPLIT_LABELS + 5, MAX_SPLIT_LABELS + 5 - WORST, -1)]
    assert [row.split for row in present(before, after).rows] == worst, "by stall"


# Each example renders and parses all metrics twice, some 50 ms.
@settings(max_examples=100)
@given(
    st.sampled_from(SORT_KEYS),
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 9), st.floats(0, 1)), min_size=1),
)
def test_sorting_puts_the_worst_first_and_loses_nobody(
    sort: SortKey, splits: list[tuple[int, float, float]]
) -> None:
    state = CoordinatorState.of("id", len(splits))
    before = scraped(state, 0.0)
    for split, (rows, wait_s, lag_s) in enumerate(splits):
        counters = ConsumerCounters(rows=rows, wait_s=wait_s, stream_s=10.0, lag_s=lag_s)
        heard(state, split, counters)
    rows_shown = present(before, scraped(state, 1.0), sort).rows
    if len(splits) <= MAX_SPLIT_LABELS:
        assert sorted(row.split for row in rows_shown) == [*range(len(splits))]
    worst = rows_shown[0]
    for row in rows_shown:
        if sort == "rows" and row.rows_per_s is not None:
            assert worst.rows_per_s is not None
            assert worst.rows_per_s <= row.rows_per_s
        elif sort == "stall" and row.stall is not None:
            assert worst.stall is not None
            assert worst.stall >= row.stall
        elif sort == "lag" and row.lag_s is not None:
            assert worst.lag_s is not None
            assert worst.lag_s >= row.lag_s


def test_all_metrics_that_warnings_are_counted_from_exist() -> None:
    known = {metric.name: metric.labels for metric in CATALOG}
    for name, label, _ in troubles._COUNTED:
        assert label in ("", *known[name])


def test_warnings_tell_what_has_happened_since_the_scrape_before() -> None:
    state = CoordinatorState.of("id", 2)
    state.deaths = 1
    first = scraped(state).samples
    assert list(troubles.new(None, first)) == ["1 consumers died"]
    assert list(troubles.new(first, first)) == []
    state.guard_rejections["schema"] += 2
    state.redelivered_rows += 1_200
    state.epochs["completed"] += 1
    state.epochs["failed"] += 1
    assert list(troubles.new(first, scraped(state).samples)) == [
        "1,200 rows that were not committed went to a replacement",
        "2 calls were rejected by the guard: schema",
        "1 epochs ended: failed",
    ]


def test_warnings_tell_who_is_missing_now() -> None:
    state = CoordinatorState.of("id", 2)
    state.epochs_now = epochs = Epochs(2)
    epochs.arrived[1] = Stream("b", 0)
    state.arrived_at = {1: -1_000_000.0}
    only = scraped(state)
    (warning,) = troubles.current(present(only, only))
    assert warning.startswith("the barrier waits for 1 of 2 splits: 0, for ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (9.96, "10s"), (99.4, "99s"), (99.6, "1m40s"), (5_999, "99m59s"), (6e3, "1h40m")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert troubles.age(seconds) == text


@pytest.mark.parametrize(
    ("stall", "cause", "blocked_on", "says"),
    [
        (None, "data", "dataset", "unknown"),
        (0.1, "data", "dataset", "training"),
        (0.3, "barrier", "dataset", "the barrier"),
        (0.3, "conversion", "dataset", "conversion"),
        (0.3, "data", "dataset", "the dataset"),
        (0.3, "data", "consumers", "a slow split"),
    ],
)
def test_the_verdict_follows_the_cause(
    stall: float | None, cause: str, blocked_on: str, says: str
) -> None:
    causes = {**dict.fromkeys(("barrier", "data", "transfer", "conversion"), 0.01), cause: 0.2}
    blocked = {"dataset": 0.1, "consumers": 0.1, blocked_on: 0.7}
    assert verdict(stall, causes, blocked).startswith(says)


def test_a_coordinator_that_is_gone_is_kept_for_a_while_unless_there_are_others() -> None:
    one, other = "http://one/metrics", "http://other/metrics"
    samples = scraped(CoordinatorState.of("id", 2, "flights")).samples
    watched = Watch()
    watched.take({one: samples, other: samples}, 0.0, "")
    assert [each.url for each in watched.coordinators] == [one, other]
    watched.take({other: samples}, 1.0, "")
    assert [each.url for each in watched.coordinators] == [other]
    watched.take({other: ConnectionRefusedError("refused")}, 2.0, "")
    assert {each.problem for each in watched.coordinators} == {
        "this coordinator has ended",
        "no metrics: refused",
    }
    watched.take({other: samples}, 2.5, "")
    assert [(each.url, each.problem) for each in watched.coordinators] == [(other, None)]
    watched.take({}, 3.0, "")
    watched.take({}, 3.0 + PATIENCE_S, "")
    assert watched.coordinators == []


def test_a_coordinator_that_is_stuck_is_not_given_up() -> None:
    watched = Watch()
    watched.take({"url": scraped(CoordinatorState.of("id", 2)).samples}, 0.0, "")
    for at in (1.0, 1.0 + 2 * PATIENCE_S):
        watched.take({"url": TimeoutError("no answer")}, at, "")
        (one,) = watched.coordinators
        assert one.problem == "no metrics: no answer"


def test_other_metrics_than_ours_are_refused_by_name() -> None:
    watched = Watch()
    watched.take({"url": Samples.parse("up 1.0\n")}, 0.0, "")
    (one,) = watched.coordinators
    assert one.present("split") is None
    assert "no metrics of asyncsplit: the endpoint serves no asyncsplit_" in (one.problem or "")


@pytest.fixture
def coordinators(tmp_path: Path) -> Iterator[Callable[[str], Endpoint]]:
    """Return a function that serves a state's metrics, announced in the directory ``found``."""
    with contextlib.ExitStack() as stack:

        def serve(name: str) -> Endpoint:
            config = TelemetryConfig(discovery_dir=str(tmp_path / "found"))
            endpoint = Endpoint.serve(CoordinatorState.of("id", 2, name), config)
            assert endpoint is not None
            return stack.enter_context(contextlib.closing(endpoint))

        yield serve


@pytest.fixture
def stuck() -> Iterator[str]:
    """Return the address of an endpoint that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_every_coordinator_of_the_node_has_a_section(
    coordinators: Callable[[str], Endpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [coordinators(name).url for name in ("train", "validation")]
    arguments = ["top", "--discovery-dir", str(tmp_path / "found"), "--interval", "0.1"]
    assert cli.main([*arguments, "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, url in zip(("train", "validation"), urls, strict=True):
        assert len([line for line in lines if line.startswith(f"{name}  2 splits  {url}  ")]) == 2
    assert "\x1b" not in "".join(lines)
    assert len([line for line in lines if line.split()[:3] == ["split", "state", "rows/s"]]) == 4


def test_an_address_needs_neither_scheme_nor_path(
    coordinators: Callable[[str], Endpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    address = coordinators("train").url.removeprefix("http://").removesuffix("/metrics")
    assert cli.main(["top", address, "--interval", "0.1", "--count", "1"]) == 0
    assert "train  2 splits" in capsys.readouterr().out


def test_what_disappears_is_named_with_a_status_of_its_own(
    coordinators: Callable[[str], Endpoint],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watch, "PATIENCE_S", 0.3)
    endpoint = coordinators("train")
    sleep = top._sleep

    def sleep_once(seconds: float) -> bool:
        endpoint.close()
        return sleep(seconds)

    monkeypatch.setattr(top, "_sleep", sleep_once)
    found = str(tmp_path / "found")
    assert cli.main(["top", "--discovery-dir", found, "--interval", "0.1"]) == 3
    assert capsys.readouterr().err == (
        f"asyncsplit top: dataset 'train' at {endpoint.url}: this coordinator has ended\n"
    )


def test_nothing_there_is_said_with_the_way_out(
    coordinators: Callable[[str], Endpoint],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty"
    assert cli.main(["top", "--discovery-dir", str(empty)]) == 1
    assert f"no coordinator serves metrics on this node: {empty} " in capsys.readouterr().err

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    coordinators("train")
    (tmp_path / "found").rename(theirs := tmp_path / "asyncsplit-4242")
    assert cli.main(["top", "--discovery-dir", str(empty)]) == 1
    assert f"--discovery-dir {theirs}." in capsys.readouterr().err


def test_an_endpoint_that_does_not_answer_holds_up_nobody(
    coordinators: Callable[[str], Endpoint],
    stuck: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(top, "TIMEOUT_S", 0.2)
    assert cli.main(["top", stuck]) == 1
    assert "no metrics: " in capsys.readouterr().err
    url = coordinators("train").url
    answers = scrape.scrape_all([f"http://{stuck}/", url], 2.0)
    assert isinstance(answers[url], Samples)
    assert isinstance(answers[f"http://{stuck}/"], Exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--interval", "0"],
        ["--interval", "nan"],
        ["--count", "0"],
        ["--sort", "name"],
        ["file:///etc/passwd"],
        ["localhost:port"],
        ["http://"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        top.main(arguments)
    assert exit_info.value.code == 2


@pytest.mark.parametrize(("end", "status"), [("q", 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_a_terminal_of_80_columns_it_is_live_and_gives_the_terminal_back(
    coordinators: Callable[[str], Endpoint], end: str | signal.Signals, status: int
) -> None:
    url = coordinators("train").url
    ours, theirs = pty.openpty()
    ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    before = termios.tcgetattr(theirs)
    with subprocess.Popen(
        [sys.executable, "-m", "asyncsplit", "top", url, "--interval", "0.2"],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    ) as process:
        screen = ""
        while "nobody is missing" not in screen:
            screen += os.read(ours, 1 << 16).decode()
        rest: list[str] = []
        reader = threading.Thread(target=_drain, args=(ours, rest))
        reader.start()
        if isinstance(end, str):
            os.write(ours, end.encode())
        else:
            process.send_signal(end)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (status, "")
    assert termios.tcgetattr(theirs) == before
    os.close(theirs)
    reader.join()
    os.close(ours)
    alternate, usual = "\x1b[?1049h", "\x1b[?1049l"
    assert (screen.count(alternate), "".join(rest).count(usual)) == (1, 1)


def _drain(terminal: int, into: list[str]) -> None:
    with contextlib.suppress(OSError):  # the other end has been closed
        while True:
            into.append(os.read(terminal, 1 << 16).decode())
