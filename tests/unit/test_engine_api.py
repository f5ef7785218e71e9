"""Ray's private API has the names, and takes the calls, that asyncsplit/engine.py relies on."""

import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data import DataContext, DataIterator, Dataset
from ray.exceptions import RayTaskError, UserCodeException

from asyncsplit import AsyncDataIterator, engine
from asyncsplit.remote_errors import KeepOriginal, unwrap

# Ray's own constructor sets fields that Ray has deprecated.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")

INTERFACES = "ray.data._internal.execution.interfaces"
EXECUTOR = "ray.data._internal.execution.streaming_executor.StreamingExecutor"
OUTPUT = "ray.data._internal.execution.streaming_executor_state.OpState"
BUILDER = "ray.data._internal.delegating_block_builder.DelegatingBlockBuilder"
BUNDLE = f"{INTERFACES}.ref_bundle"
SOURCES = "ray.data._internal.logical.operators"


def moved(what: str) -> str:
    return f"{what} is not in Ray {ray.__version__} as asyncsplit/engine.py uses it"


def find(path: str) -> Any:
    """Return the object at a dotted path: a module, then attributes."""
    head, *names = path.split(".")
    found: Any = importlib.import_module(head)
    for name in names:
        head = f"{head}.{name}"
        try:
            found = getattr(found, name)
        except AttributeError:
            try:
                found = importlib.import_module(head)
            except ImportError:
                return None
    return found


def takes(path: str, *args: object, **kwargs: object) -> bool:
    try:
        inspect.signature(find(path)).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("version", ["2.56.0", "2.56.1", "2.57.0", "2.60.3", "2.60.0rc1"])
def test_a_supported_ray_passes(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(ray, "__version__", version)
    engine.check_ray_version()


@pytest.mark.parametrize("version", ["2.55.9", "2.61.0", "3.0.0.dev0", "10.0.0"])
def test_another_ray_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(ray, "__version__", version)
    with pytest.raises(RuntimeError, match=re.escape(version)) as caught:
        engine.check_ray_version()
    assert engine.SUPPORTED_RAY in str(caught.value)


def test_the_installed_ray_is_supported() -> None:
    engine.check_ray_version()


@pytest.mark.parametrize(
    ("path", "args", "kwargs"),
    [
        ("ray.data.dataset.Dataset._create_executor", ["self"], {}),
        ("ray.data.dataset.Dataset.get_dataset_id", ["self"], {}),
        (f"{EXECUTOR}.set_external_consumer_bytes", ["self", 0], {}),
        (f"{EXECUTOR}.shutdown", ["self"], {"force": True}),
        (f"{EXECUTOR}.is_alive", ["self"], {}),
        (f"{EXECUTOR}._consumer_idling", ["self"], {}),
        (f"{EXECUTOR}.get_stats", ["self"], {}),
        ("ray.data._internal.stats.DatasetStats.to_summary", ["self"], {}),
        ("ray.data._internal.stats.DatasetStatsSummary.to_string", ["self"], {}),
        (f"{INTERFACES}.executor.OutputIterator.__next__", ["self"], {}),
        (BUILDER, [], {}),
        (f"{BUILDER}.add_block", ["self", "block"], {}),
        (f"{BUILDER}.build", ["self"], {}),
        ("ray.data.context.DataContext._set_current", ["context"], {}),
        (f"{SOURCES}.AbstractFrom._get_args", ["self"], {}),
        (f"{SOURCES}.InputData._get_args", ["self"], {}),
        ("ray.data.Schema", ["schema"], {"data_context": None}),
        ("ray.train.utils._in_ray_train_worker", [], {}),
        ("ray._private.worker.global_worker.deserialize_objects", [["value"], ["ref"]], {}),
        ("ray._raylet.CoreWorker.get_objects", ["self", ["ref"]], {"timeout_ms": 0}),
        ("ray._private.node.Node.get_session_dir_path", ["self"], {}),
        ("ray._private.serialization._object_ref_deserializer", ["id", "site", b"", b"", None], {}),
    ],
)
def test_a_call_is_taken(path: str, args: list[object], kwargs: dict[str, object]) -> None:
    assert takes(path, *args, **kwargs), moved(f"{path}, called with {args} {kwargs},")


@pytest.mark.parametrize("error", [None, ValueError("boom")])
def test_an_executors_output_says_whether_all_has_been_executed(error: Exception | None) -> None:
    state = find(OUTPUT)
    output = object.__new__(state)
    state.mark_finished(output, error)
    assert getattr(output, "_finished", False) is (error is None), moved(f"{OUTPUT}._finished")
    operator = f"{INTERFACES}.PhysicalOperator"
    assert takes(f"{operator}.has_completed", "self"), moved(operator)
    assert find(f"{operator}.input_dependencies") is not None, moved(operator)
    assert "_output_node" in inspect.getsource(find(EXECUTOR)), moved(f"{EXECUTOR}._output_node")


def test_a_dataset_tells_the_blocks_that_it_holds() -> None:
    source = find(f"{SOURCES}.InputData")
    assert takes(f"{SOURCES}.InputData.output_data", "self"), moved("InputData.output_data")
    assert source([]).output_data() == [], moved("InputData.output_data")
    assert takes(f"{SOURCES}.Read.output_data", "self"), moved("Read.output_data")
    assert "_logical_plan.dag" in inspect.getsource(Dataset), moved("Dataset._logical_plan.dag")


def test_tensorflow_tensors_are_made_by_ray() -> None:
    # Its module cannot be imported without TensorFlow.
    package = "ray.data._internal.utils.tensorflow_utils"
    found = importlib.util.find_spec(package)
    assert found is not None, moved(package)
    assert found.origin is not None
    source = Path(found.origin).read_text()
    assert "def convert_ndarray_batch_to_tf_tensor_batch(" in source, moved(package)


def test_the_bundle_iterator_is_built_from_an_executor() -> None:
    if hasattr(Dataset, "_build_bundle_iterator"):
        path, args = "ray.data.dataset.Dataset._build_bundle_iterator", ["self", "executor"]
    else:
        module = "ray.data._internal.execution.legacy_compat"
        path, args = f"{module}.execute_to_legacy_bundle_iterator", ["executor", "plan"]
    assert takes(path, *args), moved(path)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (f"{BUNDLE}.RefBundle", {"blocks", "slices", "schema"}),
        (f"{BUNDLE}.BlockEntry", {"ref", "metadata"}),
        (f"{BUNDLE}.BlockSlice", {"start_offset", "end_offset"}),
        ("ray.data.block.BlockMetadata", {"num_rows", "size_bytes", "exec_stats"}),
        ("ray.data.block.BlockExecStats", {"node_id"}),
    ],
)
def test_a_record_has_the_fields(path: str, names: set[str]) -> None:
    record = find(path)
    is_record = dataclasses.is_dataclass(record)
    fields = {field.name for field in dataclasses.fields(record)} if is_record else set()
    assert names <= fields, moved(f"{path}: {names - fields}")


@pytest.mark.parametrize("name", ["_execution_idx", "raise_original_map_exception"])
def test_the_context_has_the_field(name: str) -> None:
    assert hasattr(DataContext(), name), moved(f"DataContext.{name}")


def test_ray_caches_the_remote_function_of_an_operator_by_the_function() -> None:
    path = "ray.data._internal.execution.operators.map_operator._map_task"
    cache = find("ray.data._internal.remote_fn.CACHED_FUNCTIONS")
    find("ray.data._internal.remote_fn.cached_remote_fn")(find(path), num_cpus=1)
    assert any(key[0].__name__ == "_map_task" for key in cache), moved(path)
    engine._forget_definitions()
    assert not any(key[0].__name__ == "_map_task" for key in cache)


def test_ray_keeps_classes_of_actors_by_a_name() -> None:
    path = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
    assert find(f"{path}._AutoscalingCoordinatorActor") is not None, moved(path)
    assert isinstance(find("ray.actor._ActorClassMethodMetadata._cache"), dict), moved("ray.actor")
    assert hasattr(find("ray._raylet.PythonFunctionDescriptor"), "class_name"), moved("ray._raylet")


def test_data_iterators_build_on_what_ours_has() -> None:
    """All methods that read rows call `_iter_batches`, or `_to_ref_bundle_iterator`."""
    abstract = {"_to_ref_bundle_iterator", "get_context", "schema", "stats"}
    assert DataIterator.__abstractmethods__ == abstract, moved("DataIterator's abstract methods")
    ours = inspect.signature(AsyncDataIterator.iter_batches).parameters
    names = {*ours, "_collate_fn", "_finalize_fn"}
    theirs = set(inspect.signature(DataIterator._iter_batches).parameters)
    assert theirs == names, moved(f"DataIterator._iter_batches: {theirs ^ names}")


def test_a_task_error_has_its_cause() -> None:
    cause = ValueError()
    error = RayTaskError("function", "traceback", cause, proctitle="", pid=1, ip="localhost")
    assert error.cause is cause, moved("RayTaskError.cause")


def test_ray_asks_the_flag_while_it_handles_a_users_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Set, so that what this sets does not stay: a cluster started later would pass it on.
    monkeypatch.setenv("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "1")
    path = "ray.data._internal.planner.plan_udf_map_op._try_wrap_udf_exception"
    before = DataContext.get_current()
    context = before.copy()
    context.raise_original_map_exception = KeepOriginal()
    engine.use_context(context)
    caught: Exception | None = None
    try:
        raise ValueError("boom", 1)  # noqa: TRY301
    except ValueError as error:
        try:
            find(path)(error)
        except UserCodeException as wrapper:
            caught = wrapper
    finally:
        engine.use_context(before)
    assert caught is not None, moved(path)
    assert isinstance(caught.__cause__, ValueError)
    original = unwrap(RayTaskError("f", "text", caught, proctitle="", pid=1, ip="localhost"))
    assert (type(original), original.args) == (ValueError, ("boom", 1)), moved(path)
