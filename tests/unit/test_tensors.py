"""The same tensors as Ray Data yields, for many kinds of columns, and all that is made of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
import torch
from packaging.version import Version
from ray.data import DataIterator
from ray.data.collate_fn import (
    ArrowBatchCollateFn,
    DefaultCollateFn,
    NumpyBatchCollateFn,
    PandasBatchCollateFn,
)

from asyncsplit import jax_batches, torch_batches
from asyncsplit.collate import Recipe
from asyncsplit.pipeline import Pipeline
from tests.integration.test_formats import TABLES
from tests.same import assert_same, feed
from tests.unit.test_collate import drain

pytestmark = [
    pytest.mark.skipif(
        Version(ray.__version__) < Version("2.60"),
        reason="compared with the newest Ray, which takes more arguments together than others",
    ),
    # Ray's accessors use what the newest pandas has deprecated.
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame"),
    # Ray has deprecated plain functions for its own iterator; for ours they are one more way.
    pytest.mark.filterwarnings("ignore:Passing a function to `iter_torch_batches"),
]

SIZES: list[tuple[int | None, bool]] = [(None, False), (3, False), (10, True), (256, False)]


class Failed:
    """What somebody's iteration ended in."""

    def __init__(self, error: Exception) -> None:
        self.args = (type(error), str(error))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Failed) and self.args == other.args

    def __repr__(self) -> str:
        return f"Failed{self.args}"

    __hash__ = None  # type: ignore[assignment]


def outcome(batches: Callable[[], Iterable[Any]]) -> list[Any] | Failed:
    try:
        return list(batches())
    except Exception as error:
        return Failed(error)


def assert_same_tensors(ours: Any, theirs: Any) -> None:
    """Compare values, types, dtypes, shapes, devices and strides."""
    if isinstance(ours, torch.Tensor):
        assert type(ours) is type(theirs)
        assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
        if ours.device.type != "meta":
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    elif isinstance(ours, jax.Array):
        assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)
        np.testing.assert_array_equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name in ours:
            assert_same_tensors(ours[name], theirs[name])
    elif isinstance(ours, list | tuple):
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_tensors(one, other)
    else:
        assert_same(ours, theirs)


def torch_recipe(**arguments: Any) -> Recipe:
    defaults = {"dtypes": None, "device": "auto", "collate_fn": None, "pin_memory": False}
    return torch_batches.recipe(**{**defaults, **arguments})


class Theirs(DataIterator):
    """Ray's own iterator, given batches: those of arrays, tables and frames are the same as ours.

    That they are, ``tests/integration/test_formats.py`` shows. All that is about tensors is Ray's.
    """

    def __init__(self, blocks: list[Any]) -> None:
        self._blocks = blocks

    def _iter_batches(  # type: ignore[override]
        self,
        *,
        batch_format: str = "default",
        prefetch_batches: int = 1,
        local_shuffle_buffer_size: None = None,
        local_shuffle_seed: None = None,
        _collate_fn: Callable[[Any], Any] | None = None,
        _finalize_fn: Callable[[Any], Any] | None = None,
        **arguments: Any,
    ) -> Iterator[Any]:
        for batch in feed(Pipeline(batch_format=batch_format, **arguments), self._blocks):
            collated = batch if _collate_fn is None else _collate_fn(batch)
            yield collated if _finalize_fn is None else _finalize_fn(collated).data

    def _to_ref_bundle_iterator(self) -> Any:
        raise NotImplementedError

    def stats(self) -> str:
        raise NotImplementedError

    def schema(self) -> None:
        raise NotImplementedError

    def get_context(self) -> Any:
        raise NotImplementedError


def compare(
    blocks: list[Any], sizes: list[tuple[int | None, bool]] = SIZES, **arguments: Any
) -> list[Any]:
    """Return what both yield, in the end."""
    ours: Any = None
    for size, drop in sizes:
        cuts: dict[str, Any] = {"batch_size": size, "drop_last": drop}
        stage = torch_recipe(**arguments).pipeline(ahead=2, **cuts)
        ours = outcome(lambda: drain(stage, blocks))  # noqa: B023 - called at once
        theirs = outcome(lambda: Theirs(blocks).iter_torch_batches(**cuts, **arguments))  # noqa: B023
        if isinstance(theirs, Failed) and arguments.get("device"):
            # For a device Ray makes tensors of each chunk by itself. It cannot join unlike ones,
            # and fails otherwise than for the CPU where it fails.
            on_cpu = outcome(lambda: Theirs(blocks).iter_torch_batches(**cuts))  # noqa: B023
            if isinstance(on_cpu, Failed):
                theirs = on_cpu
            else:
                assert "All tensors must have the same dtype" in theirs.args[1]
                theirs = [{name: x.to("meta") for name, x in batch.items()} for batch in on_cpu]
        assert_same_tensors(ours, theirs)
    return cast("list[Any]", ours)


@pytest.mark.parametrize("name", TABLES)
def test_tensors_are_those_of_ray_data(name: str) -> None:
    sizes = SIZES[-1:] if name == "large and in chunks" else SIZES
    blocks = TABLES[name]()
    compare(blocks, sizes)
    compare(blocks, sizes[-2:], dtypes=torch.float32)
    compare(blocks, sizes[-1:], device="meta")


class Arrow(ArrowBatchCollateFn):
    def __call__(self, batch: pa.Table) -> Any:
        return torch.as_tensor(batch["x"].to_numpy() + 1)


class Numpy(NumpyBatchCollateFn):
    def __call__(self, batch: dict[str, Any]) -> Any:
        return [torch.tensor(batch["x"]), torch.tensor(batch["row"])]


class Pandas(PandasBatchCollateFn):
    def __call__(self, batch: pd.DataFrame) -> Any:
        return {"x": (torch.tensor(batch["x"].to_numpy()), torch.tensor(batch["row"].to_numpy()))}


class Plain(NumpyBatchCollateFn):
    def __call__(self, batch: dict[str, Any]) -> Any:
        return {"no tensors": batch["x"].tolist()}


def function(batch: dict[str, Any]) -> Any:
    return [[torch.tensor(batch["x"])], [torch.tensor(batch["row"]), torch.tensor(batch["row"])]]


@pytest.mark.parametrize("device", ["auto", "meta", torch.device("cpu")])
@pytest.mark.parametrize(
    "collate_fn", [Arrow(), Numpy(), Pandas(), Plain(), function, DefaultCollateFn()]
)
@pytest.mark.parametrize("name", ["int64", "pandas int"])
def test_a_collate_fn_gets_and_gives_what_it_does_in_ray_data(
    name: str, collate_fn: Any, device: Any
) -> None:
    assert isinstance(compare(TABLES[name](), collate_fn=collate_fn, device=device), list)


def test_a_dtype_for_each_column() -> None:
    blocks = TABLES["int64"]()
    compare(blocks, dtypes={"x": torch.float16, "row": torch.int8})
    stage = torch_recipe(dtypes={"x": torch.float16}).pipeline(ahead=0, batch_size=4)
    with pytest.raises(
        ValueError, match=r"none for columns \['row'\]: give each of \['row', 'x'\]"
    ):
        list(drain(stage, blocks))


def test_pinned_memory_needs_what_it_needs_in_ray_data() -> None:
    compare(TABLES["int64"](), pin_memory=True)
    compare(TABLES["int64"](), pin_memory=True, collate_fn=Plain())


def test_tensors_of_plain_columns_share_the_memory_of_blocks() -> None:
    (block,) = blocks = [pa.table({"x": np.arange(10.0)})]
    stage = torch_recipe().pipeline(ahead=0, batch_size=4)
    starts = [batch["x"].data_ptr() for batch in drain(stage, blocks)]
    assert starts == [block["x"].chunk(0).buffers()[1].address + 32 * i for i in range(3)]


def test_dtypes_go_with_no_collate_fn() -> None:
    with pytest.raises(ValueError, match=r"cannot be combined with dtypes=torch\.int8"):
        torch_recipe(collate_fn=Numpy(), dtypes=torch.int8)


class Columns(NumpyBatchCollateFn):
    def __call__(self, batch: dict[str, Any]) -> Any:
        return {"sum": batch["x"] + batch["row"]}


class Empty(ArrowBatchCollateFn):
    def __call__(self, batch: pa.Table) -> Any:
        return np.zeros(0 if batch["row"][0].as_py() == 3 else 3)


@pytest.mark.parametrize("name", ["int64", "bool", "tensor", "string", "pandas float32"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 3},
        {"batch_size": 10, "paddings": 0},
        {"batch_size": 10, "paddings": {"x": 1, "row": -1}, "drop_last": True},
        {"batch_size": 256, "dtypes": "float32"},
        {"batch_size": 4, "dtypes": {"x": "float32", "row": "int8"}, "synchronize_batches": True},
        {"batch_size": 4, "collate_fn": Columns()},
        {"batch_size": 3, "collate_fn": Empty()},
    ],
)
def test_jax_arrays_are_those_of_ray_data(name: str, arguments: dict[str, Any]) -> None:
    blocks = TABLES[name]()
    cuts = {"batch_size": arguments["batch_size"], "drop_last": arguments.get("drop_last", False)}
    defaults = {
        **{"dtypes": None, "collate_fn": None, "drop_last": False},
        **{"synchronize_batches": False, "paddings": None},
    }
    stage = jax_batches.recipe(**{**defaults, **arguments}).pipeline(ahead=2, **cuts)
    ours = outcome(lambda: drain(stage, blocks))
    assert_same_tensors(ours, outcome(lambda: Theirs(blocks).iter_jax_batches(**arguments)))


def test_jax_gets_batches_that_its_devices_can_share(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {
        **{"batch_size": 6, "dtypes": None, "collate_fn": None},
        **{"drop_last": False, "synchronize_batches": True, "paddings": None},
    }
    with pytest.raises(TypeError, match="must be an object of a subclass"):
        jax_batches.recipe(**{**arguments, "collate_fn": function})
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    with pytest.raises(ValueError, match="batch_size=6 cannot be shared by the 4 JAX devices"):
        jax_batches.recipe(**arguments)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="not supported with 3 JAX processes"):
        jax_batches.recipe(**arguments)
    assert jax_batches.recipe(**{**arguments, "synchronize_batches": False}).in_loop


@pytest.mark.parametrize("name", ["int64", "tensor", "bool", "string", "pandas float32"])
def test_tensorflow_tensors_are_those_of_ray_data(name: str) -> None:
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    from asyncsplit import tf_batches

    blocks = TABLES[name]()
    for size, drop in SIZES:
        stage = tf_batches.recipe(None).pipeline(ahead=2, batch_size=size, drop_last=drop)
        theirs: Any = Theirs(blocks).iter_tf_batches(batch_size=size, drop_last=drop)
        for one, other in zip(drain(stage, blocks), theirs, strict=True):
            assert list(one) == list(other)
            for column in one:
                assert one[column].dtype == other[column].dtype
                assert_same(one[column].numpy(), other[column].numpy())
