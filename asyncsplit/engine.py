"""What asyncsplit needs of Ray Data's inside: the only module that imports Ray's private API.

The model is ``SplitCoordinator`` in ``ray/data/_internal/iterator/stream_split_iterator.py``, less
Ray's ``OutputSplitter``: the plain dataset runs, and asyncsplit decides who gets which rows.
"""

import gc
import importlib
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import count
from pathlib import Path
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias, cast

import ray
from packaging.specifiers import SpecifierSet
from ray import ObjectRef
from ray.data import DataContext, Dataset, Schema
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from asyncsplit.remote_errors import KeepOriginal, unwrap

# Nothing private is imported with this module, so that `check_ray_version` speaks before a missing
# name does.
if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces import RefBundle
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

SUPPORTED_RAY = ">=2.56,<2.61"
"""Ray 2.54 does not hold a dataset back for slow consumers; 2.60 is the newest tested."""

LOOK_OUT_S = 0.05
"""For how long output is looked for more often than Ray does it, each time there is none."""

STEP_S = 0.003
"""How long to wait for the executor's next step, at most."""


def check_ray_version() -> None:
    """Raise RuntimeError unless the installed Ray is one that asyncsplit supports."""
    if not SpecifierSet(SUPPORTED_RAY).contains(ray.__version__, prereleases=True):
        raise RuntimeError(
            f"asyncsplit needs ray{SUPPORTED_RAY} and found {ray.__version__}: it stands on private"
            " API, which changes between Ray's minor releases. Install a Ray in that range."
        )


def actor_file() -> Path:
    """Return where an actor may keep a file: beside Ray's logs, the same after a restart."""
    from ray._private.worker import global_worker

    assert global_worker.node is not None
    name = f"asyncsplit-{ray.get_runtime_context().get_actor_id()}"
    return Path(global_worker.node.get_session_dir_path(), name)


def was_restarted() -> bool:
    """Tell whether Ray has restarted the actor that this process is."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


class Block(NamedTuple):
    """One block, or the part of it that a bundle selects: rows ``start`` to ``stop``."""

    ref: ObjectRef[Any]
    start: int
    stop: int
    size_bytes: int
    """Of the part, in proportion to its rows; 1 or more."""
    node_id: str | None
    """The node that produced the block, which keeps its primary copy; None if unknown."""


class Bundle(NamedTuple):
    """Blocks in the order of their rows, none of them empty; there may be no block at all."""

    blocks: tuple[Block, ...]
    schema: object | None


class StreamingExecution:
    """One execution of a dataset by Ray Data's executor, for one epoch; see `begin_epoch`."""

    def __init__(self, executor: "StreamingExecutor", bundles: "Iterator[RefBundle]"):
        self._executor = executor
        self._bundles = bundles

    @classmethod
    def start(cls, ds: Dataset, epoch: int) -> Self:
        """Start executing `ds`; block while its actors come up, if ``wait_for_min_actors_s`` asks.

        `epoch` seeds what reshuffles per execution, so that epoch 3 is shuffled alike before and
        after a restart of the coordinator; Ray's own count begins again in a new process, and
        leaves out failed executions.

        `ds` must be the caller's own, as one unpickled in an actor is: its context is changed. Copy
        the context first, to show it to anybody.

        Raises:
            ray.exceptions.RayError: the dataset's actors do not come up, if this waits for them. If
                not, `next_bundle` raises when a constructor has, and waits while there is no room.
        """
        ds.context.raise_original_map_exception = KeepOriginal()
        ds.context._execution_idx = epoch
        executor = ds._create_executor()
        if hasattr(ds, "_build_bundle_iterator"):
            bundles = ds._build_bundle_iterator(executor)
        else:  # Ray 2.56
            legacy = importlib.import_module("ray.data._internal.execution.legacy_compat")
            bundles = legacy.execute_to_legacy_bundle_iterator(executor, cast("Any", ds)._plan)
        # Ray holds the last operator back for slow consumers only once it knows there are some.
        executor.set_external_consumer_bytes(0)
        return cls(executor, bundles)

    def next_bundle(self) -> Bundle:
        """Block for the next bundle; from the pump thread only, and only while there is credit.

        Ray takes a waiting call for a starving consumer and lifts its backpressure. Whatever is
        raised here ends the execution, so never throw an exception into the waiting thread.

        Raises:
            StopIteration: the dataset is exhausted, or `shutdown` was called.
            Exception: what the dataset's code or Ray raised, as `unwrap` returns it.
        """
        self._look_out()
        if self.is_exhausted:
            raise StopIteration
        try:
            bundle = next(self._bundles)
        except RayError as error:
            cause = unwrap(error)
            raise cause from cause.__cause__
        return Bundle(tuple(_parts(bundle)), bundle.schema)

    @property
    def is_exhausted(self) -> bool:
        """Whether all has been executed without an error, and the last bundle been taken."""
        return self._is_executed and not self.has_output

    @property
    def has_output(self) -> bool:
        """Whether there is a bundle to be taken at once."""
        return not self._executor._consumer_idling()

    def ends_here(self) -> bool:
        """Tell, where there is no output, whether the bundle just taken was the last one.

        False also if Ray does not know it yet. Where the dataset holds its blocks itself, what is
        missing is only a step of the executor's, which is waited for.
        """
        operator, _ = cast("Any", self._executor)._output_node
        # Not with others: some start tasks when they are asked, and may be from one thread only.
        if not operator.input_dependencies and operator.has_completed():
            began = perf_counter()
            while not self._is_executed and perf_counter() - began < STEP_S:
                sleep(0.0002)
        return self.is_exhausted

    @property
    def _is_executed(self) -> bool:
        _, output = cast("Any", self._executor)._output_node
        return bool(output._finished)

    def _look_out(self) -> None:
        """Return when there is output, or the end of it; or after `LOOK_OUT_S`, whatever there is.

        Ray itself looks every 10 ms. But the rest of a long wait is left to Ray, which takes for
        starving only who waits inside its ``get_next``.
        """
        began = perf_counter()
        while not (self._is_executed or self.has_output) and self._executor.is_alive():
            waited_s = perf_counter() - began
            if waited_s > LOOK_OUT_S:
                return
            sleep(max(0.0005, waited_s / 10))

    def report_consumers(self, held_bytes: int, *, wanting: bool) -> None:
        """Tell Ray's backpressure how much output consumers hold, and whether they want more.

        Ray lets an execution fill its share of the object store if what it has ready is no more
        than 10 times what consumers hold, and half of that share otherwise: whoever holds much
        counts as fast. If they want no more, it is told of a single byte; 0 would mean that they
        starve.

        Upstream: ``backpressure_policy/downstream_capacity_backpressure_policy.py`` in
        ``ray/data/_internal/execution/``.
        """
        self._executor.set_external_consumer_bytes(held_bytes if wanting else 1)

    def excuse_pause(self) -> None:
        """Tell Ray's no-progress guard that consumers, not the dataset, have paused.

        The guard takes any time without progress for a hang, also that of a dataset held back
        because nobody takes its output: a long validation would end the epoch.
        """
        guard = getattr(self._executor, "_no_progress_guard", None)  # since Ray 2.58
        if guard is not None:
            guard._last_progress_time = guard._clock()

    def finish(self) -> None:
        """Shut down an execution that is exhausted, as its iterator does at its end; idempotent.

        Ray makes its statistics then, which takes the interpreter for 2 to 3 ms.
        """
        next(self._bundles, None)
        _forget_definitions()

    def shutdown(self) -> None:
        """Cancel what still runs; idempotent, from any thread, and blocks for about 2 s at most.

        A waiting `next_bundle` raises StopIteration once this is done, and Ray takes the rows so
        far for all there are: do not believe ``ds.count()`` from here on.
        """
        self._executor.shutdown(force=True)
        _forget_definitions()

    @property
    def is_alive(self) -> bool:
        """Whether the executor's thread runs."""
        return self._executor.is_alive()

    def stats(self) -> str:
        """Return Ray's summary of the execution so far."""
        return str(self._executor.get_stats().to_summary().to_string())


class Materialized:
    """The blocks of a dataset that holds them itself, for one epoch: nothing is executed.

    It has what a `StreamingExecution` has, and never waits. Upstream: ``Dataset._execute`` in
    ``ray/data/dataset.py`` leaves out the executor for such a dataset, but not what splits it.
    """

    def __init__(self, ds: Dataset, bundles: "Sequence[RefBundle]") -> None:
        """Deliver a dataset's bundles."""
        self._ds = ds
        self._bundles = deque(bundles)

    def next_bundle(self) -> Bundle:
        """Return the next bundle.

        Raises:
            StopIteration: there is none, or `shutdown` was called.
        """
        try:
            bundle = self._bundles.popleft()
        except IndexError:
            raise StopIteration from None
        return Bundle(tuple(_parts(bundle)), bundle.schema)

    @property
    def has_output(self) -> bool:
        """Whether there is another bundle."""
        return bool(self._bundles)

    def ends_here(self) -> bool:
        """Tell whether the bundle just taken was the last one."""
        return not self._bundles

    def report_consumers(self, held_bytes: int, *, wanting: bool) -> None:
        """Do nothing: there is nothing to hold back."""

    def excuse_pause(self) -> None:
        """Do nothing: nobody takes a pause for a hang."""

    def finish(self) -> None:
        """Do nothing: whoever has taken all has left nothing behind."""

    def shutdown(self) -> None:
        """Let go of what nobody took; idempotent, from any thread."""
        self._bundles.clear()

    def stats(self) -> str:
        """Return Ray's summary of how the blocks were made."""
        return str(self._ds.stats())


Execution: TypeAlias = StreamingExecution | Materialized
"""What the blocks of one epoch come from."""


def begin_epoch(ds: Dataset, epoch: int) -> Execution:
    """Start executing `ds` as `StreamingExecution.start` does, unless it holds its blocks itself.

    Raises:
        ray.exceptions.RayError: as that does.
    """
    known = getattr(cast("Any", ds)._logical_plan.dag, "output_data", lambda: None)()
    return StreamingExecution.start(ds, epoch) if known is None else Materialized(ds, known)


def _forget_definitions() -> None:
    """Let go of what past executions have defined: some 35 KB each, and more with more operators.

    Ray keeps remote functions and actor classes for the life of the process. Ray Data defines one
    for each map operator of each execution, whose label is new each time, and a class for its
    autoscaling (``data/_internal/remote_fn.py`` and
    ``data/_internal/cluster_autoscaler/default_autoscaling_coordinator.py`` in ``ray/``). Whatever
    is still at work has its own reference.
    """
    functions = importlib.import_module("ray.data._internal.remote_fn").CACHED_FUNCTIONS
    for key in [key for key in functions.copy() if key[0].__name__ == "_map_task"]:
        functions.pop(key, None)
    classes = importlib.import_module("ray.actor")._ActorClassMethodMetadata._cache
    for key in [key for key in classes.copy() if key.class_name == "_AutoscalingCoordinatorActor"]:
        classes.pop(key, None)


def dataset_schema(ds: Dataset) -> Schema | None:
    """Return ``ds.schema()``, which executes up to the first block if the schema is not known.

    `ds` must be the caller's own, see `Execution.start`.
    """
    ds.context.raise_original_map_exception = KeepOriginal()
    return cast("Schema | None", ds.schema())


def observed_schema(schema: object | None, context: DataContext) -> Schema | None:
    """Return a bundle's schema in the form ``Dataset.schema()`` has."""
    return None if schema is None else Schema(schema, data_context=context)


def dataset_tag(ds: Dataset) -> str:
    """Return the id that labels the dataset's current execution in Ray's own metrics and logs."""
    return ds.get_dataset_id()


def node_id() -> str:
    """Return the id of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id()


def no_progress_timeout(ds: Dataset) -> float | None:
    """Return after how many seconds without progress Ray fails an execution; None for never.

    A pause of all consumers longer than this counts as no progress.
    """
    timeout: float = getattr(ds.context, "execution_no_progress_timeout_s", -1)
    return timeout if timeout > 0 else None


def use_context(context: DataContext) -> None:
    """Make `context` the current one of this process, which is the coordinator's."""
    # Ray Data's executor blocks in threads of its own; Ray cannot tell and would warn of it.
    os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
    _describe_briefly()
    DataContext._set_current(context)


def _describe_briefly() -> None:
    """Let Ray's statistics do without the metadata of the blocks that a dataset holds itself.

    Ray copies it at each start of an execution, schemas and all: 15 ms for a block of 1,000
    columns.
    """
    from ray.data._internal.logical.operators import AbstractFrom, InputData

    for source in (AbstractFrom, InputData):
        cast("Any", source)._get_args = lambda operator: {"_name": operator.name}


class Packed(NamedTuple):
    """The value of a ref as it lies in the object store, to be given to `unpack`."""

    ref: ObjectRef[Any]
    value: Any


def get_packed(refs: Sequence[ObjectRef[Any]]) -> list[Packed] | None:
    """Return what refs stand for if all of it is on this node, else None; never wait.

    Most of what ``ray.get`` takes is unpickling: this leaves it to `unpack`. And it does not warn
    in an async actor.
    """
    from ray._private.worker import global_worker

    refs = list(refs)
    try:
        values = cast("Any", global_worker).core_worker.get_objects(refs, timeout_ms=0)
    except GetTimeoutError:
        return None
    # Ray returns at once if one of the refs stands for an error: others then are without metadata,
    # which every value has.
    if not all(metadata for _, metadata, *_ in values):
        return None
    return list(map(Packed, refs, values))


class Pickled(NamedTuple):
    """A value's pickle, and the buffers beside it that its data is in."""

    pickle: bytes
    buffers: Sequence[Any]


_ONE_OBJECT = b"\xd4e\x00"
"""What Ray puts before the pickle of a value that is a Python object, and not a number or text."""


def pickled(packed: Packed) -> Pickled | None:
    """Return what `unpack` would unpickle: a list of one object; None if that is not all of it.

    Upstream: ``ray/_private/serialization.py``.
    """
    from ray import _raylet
    from ray._private.ray_constants import OBJECT_METADATA_TYPE_PYTHON

    raylet = cast("Any", _raylet)
    data, metadata, *_ = packed.value
    if metadata != OBJECT_METADATA_TYPE_PYTHON or data is None:
        return None
    head, pickle_and_buffers = raylet.split_buffer(data)
    if bytes(head) != _ONE_OBJECT:
        return None
    in_band, buffers = raylet.unpack_pickle5_buffers(pickle_and_buffers)
    return Pickled(bytes(in_band), buffers)


class _TableReader(pickle.Unpickler):
    """Reads a pickled table up to where Ray would make arrays, with numbers in place of buffers."""

    def __init__(self, pickled: bytes) -> None:
        # As bytes, which pass for buffers that are not to be written to.
        super().__init__(BytesIO(pickled), buffers=(number.to_bytes(4) for number in count()))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("ray._private.arrow_serialization", "_reconstruct_table"):
            return lambda columns, schema: (columns, schema)
        if (module, name) == ("pyarrow.lib", "py_buffer"):
            return int.from_bytes
        if module in ("ray._private.arrow_serialization", "pyarrow.lib"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a table")


def table_buffers(pickled: bytes) -> tuple[Any, int, list[int]] | None:
    """Return what the pickle of a table says, if its columns have one chunk each, without nulls.

    That is its schema, its number of rows, and for each column which of the buffers beside the
    pickle has its values. None if it is anything else, or another Ray pickles tables otherwise.

    Upstream: ``_arrow_table_reduce`` in ``ray/_private/arrow_serialization.py``.
    """
    try:
        ((columns, schema),) = _TableReader(pickled).load()
        chunks = [chunk for (chunk,), _ in columns]
        (rows,) = {chunk.length for chunk in chunks}
        if any(each.buffers[0] is not None or each.offset or each.children for each in chunks):
            return None
        return schema, rows, [values for _, values in (chunk.buffers for chunk in chunks)]
    except Exception:  # whatever unpickling something else can raise
        return None


def unpack(packed: Packed) -> Any:
    """Return the value; raise like ``ray.get``."""
    from ray._private.worker import global_worker

    # A block of 1,000 columns takes so many objects for a moment that collecting garbage, which
    # there is none of, takes as long again.
    collecting = gc.isenabled()
    gc.disable()
    try:
        (value,) = global_worker.deserialize_objects([packed.value], [packed.ref])
    finally:
        if collecting:
            gc.enable()
    if isinstance(value, RayTaskError):
        raise value.as_instanceof_cause()
    if isinstance(value, RayError):
        raise value
    return value


def reduce_untracked(ref: ObjectRef[Any]) -> tuple[Callable[..., ObjectRef[Any]], tuple[Any, ...]]:
    """Return how to pickle `ref` without Ray's keeping the object for ever, as it else does.

    Nor does it keep it for whoever unpickles it: somebody else has to.
    """
    from ray._private.serialization import _object_ref_deserializer
    from ray._private.worker import global_worker

    core: Any = cast("Any", global_worker).core_worker
    ref, owner, status = core.serialize_object_ref(ref)
    parts = (ref.binary(), ref.call_site(), owner, status, ref.tensor_transport())
    return _object_ref_deserializer, parts


def concat_blocks(blocks: Sequence[Any]) -> Any:
    """Return one block with the rows of all, their types promoted as Ray Data does in a batch."""
    from ray.data._internal.delegating_block_builder import DelegatingBlockBuilder

    builder = DelegatingBlockBuilder()
    for block in blocks:
        builder.add_block(block)
    return builder.build()


def in_train_worker() -> bool:
    """Tell whether this process is a worker of Ray Train."""
    # Nobody is one without that module, which takes seconds to import.
    if "ray.train" not in sys.modules:
        return False
    from ray.train.utils import _in_ray_train_worker

    return bool(_in_ray_train_worker())


def to_tf_tensors(batch: Any, dtypes: Any) -> Any:
    """Return a batch of TensorFlow tensors as Ray makes it of a NumPy batch."""
    try:
        from ray.data._internal.utils import tensorflow_utils
    except ImportError:  # Ray 2.56
        tensorflow_utils = importlib.import_module("ray.air._internal.tensorflow_utils")
    return tensorflow_utils.convert_ndarray_batch_to_tf_tensor_batch(batch, dtypes=dtypes)


def _parts(bundle: "RefBundle") -> Iterator[Block]:
    for entry, selected in zip(bundle.blocks, bundle.slices or (), strict=True):
        metadata = entry.metadata
        rows = metadata.num_rows
        assert rows is not None, "Ray Data counts the rows of every block it puts out"
        start, stop = (selected.start_offset, selected.end_offset) if selected else (0, rows)
        if start < stop:
            size = max(1, round((metadata.size_bytes or 0) * (stop - start) / rows))
            node_id = metadata.exec_stats.node_id if metadata.exec_stats else None
            yield Block(cast("ObjectRef[Any]", entry.ref), start, stop, size, node_id)
