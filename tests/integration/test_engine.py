import asyncio
import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
from ray import cloudpickle
from ray.data import DataContext, Dataset, FileShuffleConfig
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError, WorkerCrashedError

from asyncsplit import engine, plain
from asyncsplit.engine import Bundle, Execution, Materialized, StreamingExecution
from asyncsplit.remote_errors import KeepOriginal, RemoteTraceback, pack_error, unpack_error, unwrap

# Ray Data uses what Ray and pandas have deprecated.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")


@pytest.fixture(autouse=True)
def no_thread_left(ray_cluster: None) -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    names = ("StreamingExecutor-", "ray-data-metadata-prefetch")
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith(names)]
    for thread in left:
        thread.join(timeout=10)
    assert not [t.name for t in left if t.is_alive()], "a thread outlived its execution"


remote: Any = ray.remote(num_cpus=0)


class Gate:
    """Tells a test that the dataset's code was reached; never lets that code go on."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()

    async def hold(self) -> None:
        self._reached.set()
        await asyncio.Event().wait()

    async def reached(self) -> None:
        await self._reached.wait()


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


class TellTale(Exception):
    """Cannot be unpickled the usual way: __init__ takes what it does not leave in args."""

    def __init__(self, *, shard: int) -> None:
        super().__init__(f"shard {shard} is broken")
        self.shard = shard


class Changing(Exception):
    """Unpickled the usual way it changes: __init__ leaves something else in args."""

    def __init__(self, code: object) -> None:
        super().__init__(f"code {code}")


def drain(execution: Execution) -> list[Bundle]:
    bundles = []
    while True:
        try:
            bundles.append(execution.next_bundle())
        except StopIteration:
            execution.finish()
            return bundles


def get_ready(refs: list[Any]) -> list[Any]:
    packed = engine.get_packed(refs)
    assert packed is not None
    return list(map(engine.unpack, packed))


def rows_of(bundles: list[Bundle]) -> list[int]:
    parts = [part for bundle in bundles for part in bundle.blocks]
    tables = get_ready([part.ref for part in parts])
    return [
        row
        for table, part in zip(tables, parts, strict=True)
        for row in table.slice(part.start, part.stop - part.start)["id"].to_pylist()
    ]


def numbers(rows: int, blocks: int) -> Dataset:
    ds = ray.data.range(rows, override_num_blocks=blocks).map_batches(lambda batch: batch)
    ds.context.execution_options.preserve_order = True
    return ds


def failing(make: Callable[[], BaseException]) -> Dataset:
    def fail(batch: object) -> object:
        raise make()

    return ray.data.range(10).map_batches(fail)


def error_of(ds: Dataset) -> BaseException:
    execution = StreamingExecution.start(ds, epoch=0)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        drain(execution)
    assert not execution.is_alive
    return caught.value


def test_an_execution_delivers_every_row_once_and_in_order() -> None:
    execution = StreamingExecution.start(numbers(1000, blocks=8), epoch=0)
    bundles = drain(execution)
    assert rows_of(bundles) == list(range(1000))
    parts = [part for bundle in bundles for part in bundle.blocks]
    assert sum(part.size_bytes for part in parts) == 8 * 1000
    assert {part.node_id for part in parts} == {ray.get_runtime_context().get_node_id()}
    assert "ReadRange" in execution.stats()
    execution.shutdown()


def test_with_the_last_bundle_it_is_known_that_no_other_comes() -> None:
    execution = StreamingExecution.start(numbers(1000, blocks=8), epoch=0)
    execution._executor.join(timeout=60)
    ends = []
    for _ in range(8):
        assert execution.has_output
        assert not execution.is_exhausted
        execution.next_bundle()
        ends.append(execution.ends_here())
    assert ends == [False] * 7 + [True]
    assert not execution.has_output
    for _ in range(2):
        execution.finish()
        assert "ReadRange" in execution.stats()
    with pytest.raises(StopIteration):
        execution.next_bundle()


def test_an_execution_that_fails_is_not_exhausted() -> None:
    execution = StreamingExecution.start(failing(lambda: ValueError("boom")), epoch=0)
    execution._executor.join(timeout=60)
    assert not execution.is_alive
    assert not execution.is_exhausted
    with pytest.raises(ValueError, match="boom"):
        execution.next_bundle()


def test_a_bundle_of_many_blocks_and_of_slices_keeps_the_order() -> None:
    whole = numbers(100, blocks=5).materialize()
    bundles = list(whole.iter_internal_ref_bundles())
    merged = type(bundles[0]).merge_ref_bundles(bundles)
    assert len(merged.blocks) == 5
    plan = type(whole._logical_plan)
    source: Any = type(whole._logical_plan.dag)
    first, second = merged.slice(37)
    ds = Dataset(plan(source([second, first]), whole.context), whole.context, whole._in_stats)
    taken = drain(StreamingExecution.start(ds, epoch=0))
    assert rows_of(taken) == [*range(37, 100), *range(37)]
    assert [len(bundle.blocks) for bundle in taken] == [4, 2]
    assert [(part.start, part.stop) for part in taken[1].blocks] == [(0, 20), (0, 17)]
    assert [part.size_bytes for part in taken[1].blocks] == [160, 136]


@pytest.mark.parametrize(
    "make",
    [
        lambda: numbers(100, blocks=5).materialize(),
        lambda: ray.data.from_items([{"id": i} for i in range(100)], override_num_blocks=3),
        lambda: ray.data.from_pandas([pd.DataFrame({"id": range(60)}), pd.DataFrame({"id": []})]),
        lambda: ray.data.from_arrow(pa.table({"id": range(20)})),
        lambda: ray.data.from_items([]),
    ],
    ids=["materialize", "items", "pandas", "arrow", "empty"],
)
def test_a_dataset_that_holds_its_blocks_is_not_executed(make: Callable[[], Dataset]) -> None:
    ds = make()
    executed = drain(StreamingExecution.start(ds, epoch=0))
    for epoch in range(2):
        execution = engine.begin_epoch(ds, epoch)
        assert isinstance(execution, Materialized)
        bundles = drain(execution)
        assert [bundle.blocks for bundle in bundles] == [bundle.blocks for bundle in executed]
        assert bundles[:1] == executed[:1]  # the schema of the first is what counts
        assert execution.stats() == ds.stats()


@pytest.mark.parametrize(
    "make",
    [
        lambda: numbers(10, blocks=2),
        lambda: ray.data.range(10),
        lambda: numbers(10, blocks=2).materialize().limit(5),
        lambda: ray.data.from_items([{"id": 1}]).randomize_block_order(),
    ],
    ids=["map", "read", "limit", "order"],
)
def test_any_other_dataset_is_executed(make: Callable[[], Dataset]) -> None:
    execution = engine.begin_epoch(make(), epoch=0)
    assert isinstance(execution, StreamingExecution)
    execution.shutdown()


def test_what_is_not_executed_knows_its_end_and_can_be_left() -> None:
    ds = numbers(100, blocks=4).materialize()
    whole, left = engine.begin_epoch(ds, epoch=0), engine.begin_epoch(ds, epoch=1)
    ends = []
    for _ in range(4):
        assert whole.has_output
        whole.next_bundle()
        ends.append(whole.ends_here())
    assert ends == [False, False, False, True]
    assert not whole.has_output
    left.next_bundle()
    left.shutdown()
    for each in (whole, left):
        with pytest.raises(StopIteration):
            each.next_bundle()


def test_blocks_without_rows_are_left_out() -> None:
    ds = numbers(100, blocks=4).map_batches(lambda batch: {"id": batch["id"][batch["id"] >= 60]})
    bundles = drain(StreamingExecution.start(ds, epoch=0))
    assert rows_of(bundles) == list(range(60, 100))
    assert all(part.stop > part.start for bundle in bundles for part in bundle.blocks)


@pytest.mark.parametrize(
    "change",
    [
        lambda ds: ds.limit(31),
        lambda ds: ds.random_shuffle(),
        lambda ds: ds.repartition(3),
        lambda ds: ds.sort("id", descending=True),
        lambda ds: ds.union(ray.data.range(7)),
        lambda ds: ds.map_batches(lambda df: df, batch_format="pandas"),
        lambda ds: ds.materialize(),
    ],
    ids=["limit", "shuffle", "repartition", "sort", "union", "pandas", "materialize"],
)
def test_every_operator_tells_the_rows_of_its_blocks(change: Callable[[Dataset], Dataset]) -> None:
    ds = change(numbers(100, blocks=4))
    parts = [
        part for bundle in drain(StreamingExecution.start(ds, epoch=0)) for part in bundle.blocks
    ]
    blocks = get_ready([part.ref for part in parts])
    assert [part.stop for part in parts] == [len(block) for block in blocks]
    assert sum(len(block) for block in blocks) == ds.count()


def test_the_same_dataset_is_executed_again_and_again_after_an_abort_too() -> None:
    ds = numbers(300, blocks=6)
    for epoch in range(4):
        execution = StreamingExecution.start(ds, epoch)
        assert engine.dataset_tag(ds).endswith(f"_{epoch}")
        if epoch == 1:
            execution.next_bundle()
        else:
            assert rows_of(drain(execution)) == list(range(300))
        execution.shutdown()
        assert not execution.is_alive


def test_an_epoch_is_shuffled_alike_whatever_ran_before(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.csv").write_text(f"id\n{i}\n")
    # Not Parquet: Ray starts 32 actors to list such files.
    ds = ray.data.read_csv(str(tmp_path), shuffle=FileShuffleConfig(seed=7))
    ds.context.execution_options.preserve_order = True

    def orders(epochs: list[int]) -> list[list[int]]:
        copy = cloudpickle.loads(cloudpickle.dumps(ds))
        engine.dataset_schema(copy)
        return [rows_of(drain(StreamingExecution.start(copy, epoch))) for epoch in epochs]

    first, second, third = orders([0, 1, 2])
    assert orders([2]) == [third]
    assert sorted(first) == list(range(8))
    assert not first == second == third


def test_a_started_execution_is_held_back_for_its_consumers() -> None:
    execution = StreamingExecution.start(numbers(10, blocks=1), epoch=0)
    assert execution._executor._resource_manager.has_external_consumer
    execution.shutdown()


def test_shutdown_frees_a_pump_that_waits_for_the_datasets_code() -> None:
    gate = remote(Gate).remote()

    def hold(batch: object) -> object:
        ray.get(gate.hold.remote())
        return batch

    execution = StreamingExecution.start(ray.data.range(10).map_batches(hold), epoch=0)
    ends: list[BaseException] = []

    def pump() -> None:
        try:
            execution.next_bundle()
        except BaseException as end:
            ends.append(end)

    waiting = threading.Thread(target=pump)
    waiting.start()
    ray.get(gate.reached.remote())
    execution.report_consumers(1, wanting=True)
    shutting = [threading.Thread(target=execution.shutdown) for _ in range(2)]
    for thread in [*shutting, waiting]:
        if thread is not waiting:
            thread.start()
    for thread in [*shutting, waiting]:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert [type(end) for end in ends] == [StopIteration]
    execution.shutdown()
    execution.report_consumers(0, wanting=False)
    with pytest.raises(StopIteration):
        execution.next_bundle()
    assert not execution.is_alive


@pytest.mark.parametrize(
    ("make", "args"),
    [
        (lambda: ValueError("boom", 3), ("boom", 3)),
        (lambda: KeyError("column"), ("column",)),
        (lambda: FileNotFoundError(2, "gone", "/a/b"), (2, "gone")),
        (lambda: TellTale(shard=4), ("shard 4 is broken",)),
        (lambda: Changing(5), ("code 5",)),
    ],
    ids=["ValueError", "KeyError", "OSError", "TellTale", "Changing"],
)
def test_what_the_users_function_raises_arrives_as_it_was(
    make: Callable[[], Exception], args: tuple[object, ...]
) -> None:
    error = error_of(failing(make))
    for arrived in (error, unpack_error(pack_error(error))):
        assert type(arrived).__qualname__ == type(make()).__qualname__
        assert arrived.args == args
        assert str(arrived) == str(make())
        assert vars(arrived) == vars(make())
        assert isinstance(arrived.__cause__, RemoteTraceback)
        assert "in fail" in str(arrived.__cause__)


def test_the_error_of_an_actors_method_and_of_a_read_arrive_as_they_were() -> None:
    class Fails:
        def __call__(self, batch: object) -> object:
            raise LookupError(1)

    assert isinstance(error_of(ray.data.range(4).map_batches(Fails, concurrency=1)), LookupError)
    assert isinstance(unwrap(_schema_error(failing(lambda: LookupError(2)))), LookupError)


def _schema_error(ds: Dataset) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        engine.dataset_schema(ds)
    return caught.value


def test_stop_iteration_in_the_users_function_is_an_error_and_ends_nothing_in_silence() -> None:
    def exhausts(batch: Any) -> Any:
        if 5 in batch["id"]:
            next(iter(()))
        return batch

    error = error_of(ray.data.range(10, override_num_blocks=1).map_batches(exhausts, batch_size=4))
    assert isinstance(error, RuntimeError)
    assert "StopIteration" in str(error)


def test_an_error_that_cannot_be_pickled_arrives_as_text() -> None:
    error = error_of(failing(lambda: ValueError("held", threading.Lock())))
    assert "held" in str(error.__cause__)
    arrived = unpack_error(pack_error(ValueError("held", threading.Lock())))
    assert isinstance(arrived, RuntimeError)
    assert "ValueError: ('held'" in str(arrived)


def test_errors_of_rays_own_come_back_as_they_are() -> None:
    for error in (WorkerCrashedError(), ActorDiedError()):
        assert unwrap(error) is error
        arrived = unpack_error(pack_error(error))
        assert (type(arrived), str(arrived)) == (type(error), str(error))


def test_unwrap_goes_through_every_layer_of_tasks() -> None:
    def fail(depth: int) -> None:
        if depth:
            ray.get(remote(fail).remote(depth - 1))
        raise ValueError("innermost", depth)

    with pytest.raises(RayTaskError) as caught:
        ray.get(remote(fail).remote(2))
    error = unwrap(RayTaskError("outermost", "its traceback", caught.value))
    assert "in fail" in str(error.__cause__)
    assert type(error) is ValueError
    assert error.args == ("innermost", 0)


@pytest.mark.filterwarnings("ignore:.ray_remote_args:DeprecationWarning")
def test_user_errors_are_retried_as_without_asyncsplit() -> None:
    counter = remote(Counter).remote()

    def fail_once(batch: object) -> object:
        if ray.get(counter.add.remote()) == 1:
            raise ConnectionError("flaky")
        return batch

    ds = ray.data.range(10, override_num_blocks=1)
    retried = ds.map_batches(fail_once, retry_exceptions=[ConnectionError], max_retries=2)
    assert rows_of(drain(StreamingExecution.start(retried, epoch=0))) == list(range(10))


def test_map_retries_match_as_without_asyncsplit() -> None:
    counter = remote(Counter).remote()

    def fail_once(batch: object) -> object:
        if ray.get(counter.add.remote()) == 1:
            raise ConnectionError("flaky")
        return batch

    ds = ray.data.range(10, override_num_blocks=1).map_batches(fail_once)
    if not hasattr(ds.context, "retried_map_errors"):
        pytest.skip(f"Ray {ray.__version__} does not retry map errors")
    ds.context.max_map_retries = 1
    ds.context.retried_map_errors = ["UserCodeException.*ConnectionError: flaky"]
    assert rows_of(drain(StreamingExecution.start(ds, epoch=0))) == list(range(10))


class Breaks:
    def __init__(self) -> None:
        raise ValueError("no model file")

    def __call__(self, batch: object) -> object:
        return batch


def test_an_actor_whose_constructor_raises_fails_the_first_bundle() -> None:
    error = error_of(ray.data.range(10).map_batches(Breaks, concurrency=1))
    assert isinstance(error, ActorDiedError)
    assert "ValueError: no model file" in str(error)


def test_an_actor_whose_constructor_raises_fails_the_start_if_that_waits_for_it() -> None:
    ds = ray.data.range(10).map_batches(Breaks, concurrency=1)
    ds.context.wait_for_min_actors_s = 60
    with pytest.raises(ActorDiedError, match="ValueError: no model file"):
        StreamingExecution.start(ds, epoch=0)


def test_actors_that_do_not_fit_fail_the_start_if_that_waits_for_them() -> None:
    class Fine(Breaks):
        def __init__(self) -> None:
            pass

    ds = ray.data.range(10).map_batches(Fine, concurrency=1, num_cpus=64)
    ds.context.wait_for_min_actors_s = 1
    with pytest.raises(GetTimeoutError):
        StreamingExecution.start(ds, epoch=0)


def test_workers_need_not_have_asyncsplit() -> None:
    worker = """
import pickle, sys
sys.modules["asyncsplit"] = None
flag = pickle.load(sys.stdin.buffer)
assert not flag
try:
    raise ValueError("boom")
except ValueError:
    try:
        bool(flag)
    except Exception as error:
        sys.stdout.buffer.write(pickle.dumps(error))
"""
    raised = subprocess.run(
        [sys.executable, "-c", worker],
        input=cloudpickle.dumps(KeepOriginal()),
        stdout=subprocess.PIPE,
        check=True,
    )
    error = unwrap(RayTaskError("map", "text", pickle.loads(raised.stdout)))
    assert type(error) is ValueError
    assert error.args == ("boom",)


def test_the_schema_is_that_of_the_dataset_pickled_or_observed() -> None:
    ds = numbers(10, blocks=1)
    expected = ds.schema()
    copy = cloudpickle.loads(cloudpickle.dumps(ds))
    schema = engine.dataset_schema(copy)
    assert cloudpickle.loads(cloudpickle.dumps(schema)) == expected
    (bundle,) = drain(StreamingExecution.start(copy, epoch=0))
    assert engine.observed_schema(bundle.schema, ds.context) == expected
    assert engine.observed_schema(None, ds.context) is None


def test_a_pickled_dataset_keeps_its_name_and_context() -> None:
    ds = ray.data.range(10)
    ds.set_name("train")
    ds.context.target_max_block_size = 12345
    copy = cloudpickle.loads(cloudpickle.dumps(ds))
    assert engine.dataset_tag(copy).startswith("train_")
    assert copy.context.target_max_block_size == 12345


def test_no_progress_timeout_is_the_contexts() -> None:
    ds = ray.data.range(10)
    if not hasattr(ds.context, "execution_no_progress_timeout_s"):
        assert engine.no_progress_timeout(ds) is None
        return
    ds.context.execution_no_progress_timeout_s = 5
    assert engine.no_progress_timeout(ds) == 5
    ds.context.execution_no_progress_timeout_s = -1
    assert engine.no_progress_timeout(ds) is None


def test_what_is_here_comes_in_order_and_errors_are_those_of_ray_get() -> None:
    def fail() -> None:
        raise ValueError("boom")

    assert get_ready([ray.put(i) for i in range(3)]) == [0, 1, 2]
    failing = remote(fail).remote()
    ray.wait([failing])
    with pytest.raises(ValueError, match="boom") as caught:
        get_ready([failing])
    assert isinstance(caught.value, RayTaskError)


def test_a_table_of_numbers_is_read_from_what_ray_has_pickled() -> None:
    def make(rows: int) -> pa.Table:
        return pa.table({"a": range(rows), "b": np.arange(rows) / 2})

    refs = [ray.put(make(3)), remote(make).remote(3), ray.put(make(2))]
    ray.wait(refs, num_returns=3)
    for packed, rows in zip(engine.get_packed(refs) or (), (3, 3, 2), strict=True):
        pickled = engine.pickled(packed)
        assert pickled is not None, f"Ray {ray.__version__} puts something else around a pickle"
        block = plain.read(pickled)
        assert block is not None, f"Ray {ray.__version__} pickles tables in another way"
        assert block.to_table().equals(make(rows))


def test_what_is_no_table_is_not_read() -> None:
    def fail() -> None:
        raise ValueError("boom")

    failing = remote(fail).remote()
    ray.wait([failing])
    refs = [ray.put(each) for each in (None, 1, "text", b"bytes", [1, 2], np.zeros(3))]
    for ref in (failing, *refs, ray.put(pd.DataFrame({"a": [1]}))):
        packed = engine.get_packed([ref])
        assert packed is not None
        pickled = engine.pickled(packed[0])
        assert pickled is None or plain.read(pickled) is None


def test_unpacking_leaves_the_garbage_collector_as_it_was() -> None:
    def fail() -> None:
        raise ValueError("boom")

    failing = remote(fail).remote()
    ray.wait([failing])
    try:
        for set_it, enabled in ((gc.disable, False), (gc.enable, True)):
            set_it()
            assert get_ready([ray.put(1)]) == [1]
            with pytest.raises(ValueError, match="boom"):
                get_ready([failing])
            assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_what_is_not_here_is_not_waited_for() -> None:
    class Gate:
        async def wait(self) -> None:
            await asyncio.Event().wait()

    def fail() -> None:
        raise ValueError("boom")

    closed = remote(Gate).remote().wait.remote()
    failing = remote(fail).remote()
    ray.wait([failing])
    assert engine.get_packed([ray.put(1), closed]) is None
    assert engine.get_packed([failing, closed]) is None
    assert engine.get_packed([closed, failing]) is None


def test_getting_does_not_warn_in_an_async_actor() -> None:
    class Reader:
        async def read(self, get: Callable[[list[Any]], object], refs: list[Any]) -> object:
            worker = sys.modules["ray._private.worker"]
            return get(refs), worker.blocking_get_inside_async_warned

    def get(refs: list[Any]) -> object:
        return [engine.unpack(packed) for packed in engine.get_packed(refs) or ()]

    reader = remote(Reader).remote()
    assert ray.get(reader.read.remote(get, [ray.put(1)])) == ([1], False)
    assert ray.get(reader.read.remote(ray.get, [ray.put(1)])) == ([1], True)


def test_use_context_makes_it_the_processs_current_one() -> None:
    before = DataContext.get_current()
    context = before.copy()
    engine.use_context(context)
    try:
        assert DataContext.get_current() is context
    finally:
        engine.use_context(before)


def test_a_coordinator_does_not_describe_the_blocks_a_dataset_holds() -> None:
    engine.use_context(DataContext.get_current())
    held = ray.data.from_arrow(pa.table({"x": [1]}))
    for ds in (held, held.materialize()):
        (operator,) = ds._logical_plan.dag.post_order_iter()
        assert operator._get_args() == {"_name": operator.name}


def test_concat_promotes_types_and_keeps_empty_blocks_out() -> None:
    ints, floats = pa.table({"x": [1, 2]}), pa.table({"x": [0.5]})
    joined = engine.concat_blocks([ints, floats.slice(0, 0), floats])
    assert joined["x"].to_pylist() == [1.0, 2.0, 0.5]
    wider = engine.concat_blocks([pa.table({"x": [1]}), pa.table({"x": [2], "y": ["b"]})])
    assert wider.to_pylist() == [{"x": 1, "y": None}, {"x": 2, "y": "b"}]
    frames = engine.concat_blocks([pd.DataFrame({"x": [1]}), pd.DataFrame({"x": [2]})])
    np.testing.assert_array_equal(frames["x"].to_numpy(), [1, 2])
