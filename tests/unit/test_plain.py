"""Tables of numbers are read as arrays, alike to what conversion gives; all else is left to Ray."""

import copyreg
import gc
import importlib
import pickle
import weakref
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.data.extensions import ArrowTensorArray

from asyncsplit import plain
from asyncsplit.engine import Pickled
from asyncsplit.formats import Slab
from asyncsplit.pipeline import Pipeline
from tests.profiles import FEWER
from tests.same import assert_same

upstream = importlib.import_module("ray._private.arrow_serialization")

KINDS = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint64()),
    *(pa.float16(), pa.float32(), pa.float64()),
    *(pa.timestamp("us"), pa.timestamp("ns", tz="Europe/Bern"), pa.duration("s")),
]

some_kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=6)


def as_ray_pickles(*value: Any) -> Pickled:
    """Pickle as Ray does, which leaves the contents of buffers beside the pickle."""
    file, buffers = BytesIO(), list[memoryview]()
    pickler = pickle.Pickler(file, 5, buffer_callback=lambda each: buffers.append(each.raw()))
    pickler.dispatch_table = {
        **copyreg.dispatch_table,
        pa.Table: upstream._arrow_table_reduce,
    }
    pickler.dump([*value])
    return Pickled(file.getvalue(), [memoryview(bytes(buffer)) for buffer in buffers])


def table(kinds: Sequence[pa.DataType], rows: int, first: int = 0) -> pa.Table:
    numbers = (np.arange(first, first + 8 * rows) % 101).astype(np.uint8)  # none makes a NaN
    return pa.table(
        {
            f"c{place}": pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(numbers)])
            for place, kind in enumerate(kinds)
        }
    )


@FEWER
@given(some_kinds, st.integers(1, 40), st.data())
def test_arrays_are_those_of_a_conversion(
    kinds: list[pa.DataType], rows: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    sliced = table(kinds, rows).slice(start, stop - start)
    block = plain.read(as_ray_pickles(sliced))
    assert block is not None
    assert len(block) == stop - start
    assert_same(block.columns, Slab(sliced, "numpy").batch(0, stop - start))
    assert block.to_table().equals(sliced)
    half = len(block) // 2
    assert block.slice(half, len(block)).to_table().equals(sliced.slice(half))
    assert not any(values.flags.writeable for values in block.columns.values())


@FEWER
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 200)), min_size=1), some_kinds)
def test_blocks_of_one_layout_keep_their_own_values(
    blocks: list[tuple[int, int]], kinds: list[pa.DataType]
) -> None:
    tables = [table(kinds, rows, first) for rows, first in blocks]
    read = [plain.read(as_ray_pickles(each)) for each in tables]
    assert [block and block.to_table() for block in read] == tables


def array(*values: Any) -> pa.Table:
    return pa.table({"number": [1] * len(values), "other": pa.array(values)})


OTHERS = {
    "nulls": array(1, None),
    "text": array("a", "b"),
    "bool": array(True, False),
    "list": array([1], [2]),
    "struct": array({"a": 1}),
    "null type": array(None),
    "date": pa.table({"date": pa.array([1], pa.date32())}),
    "decimal": pa.table({"decimal": pa.array([1], pa.decimal128(5))}),
    "dictionary": pa.table({"word": pa.array(["a", "b"]).dictionary_encode()}),
    "tensor": pa.table({"image": ArrowTensorArray.from_numpy(np.zeros((3, 2, 2)))}),
    "chunks": pa.concat_tables([array(1), array(2)]),
    "no rows": array(1).slice(1),
    "no columns": pa.table({}),
    "pandas": pd.DataFrame({"a": [1]}),
    "dict": {"a": np.zeros(3)},
    "array": np.zeros(3),
    "nothing": None,
}


@pytest.mark.parametrize("block", OTHERS.values(), ids=OTHERS)
def test_what_is_not_plain_is_left_to_ray(block: Any) -> None:
    assert plain.read(as_ray_pickles(block)) is None


def test_two_tables_in_one_value_are_left_to_ray() -> None:
    assert plain.read(as_ray_pickles(table(KINDS, 1), table(KINDS, 1))) is None


def test_a_pickle_that_calls_anything_else_is_not_run() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return pytest.fail, ("it was called",)

    assert plain.read(as_ray_pickles(Bomb())) is None


@FEWER
@given(
    st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=8),
    st.none() | st.integers(1, 25),
    st.booleans(),
)
def test_batches_are_the_same_with_and_without(
    blocks: list[tuple[int, bool]], size: int | None, drop_last: bool
) -> None:
    """Also where only some blocks are plain, and where their columns are not the same."""
    batches = []
    for use_plain in (False, True):
        pipeline = Pipeline(batch_size=size, batch_format="numpy", drop_last=drop_last)
        for number, (rows, may_be) in enumerate(blocks):
            block = table([pa.float64(), pa.int64() if number % 3 else pa.int16()], rows, number)
            read = plain.read(as_ray_pickles(block)) if use_plain and may_be else None
            pipeline.add(read or block, rows // 3, rows)
        pipeline.finish()
        batches.append(list(pipeline.batches))
    assert_same(*batches)


@pytest.mark.parametrize("size", [None, 4])
def test_a_block_is_let_go_of_with_its_last_batch(size: int | None) -> None:
    class Buffer(bytearray):
        """Unlike a memoryview, it can be referred to weakly."""

    pickled = as_ray_pickles(table([pa.int64()], 8))
    buffer = Buffer(pickled.buffers[0])
    alive = weakref.ref(buffer)
    pipeline = Pipeline(batch_size=size, batch_format="numpy")
    pipeline.add(plain.read(pickled._replace(buffers=[buffer])), 0, 8)
    del buffer
    batch = None
    for _ in range(8 // (size or 8)):
        assert alive() is not None
        batch = next(pipeline.batches)
    assert alive() is not None
    del batch
    gc.collect()
    assert alive() is None


def test_pipelines_that_make_tables_want_tables() -> None:
    takes = {
        batch_format: Pipeline(batch_size=2, batch_format=batch_format).takes_plain
        for batch_format in ("numpy", "pandas", "pyarrow", None)
    }
    assert takes == {"numpy": True, "pandas": False, "pyarrow": False, None: False}
    shuffled = Pipeline(batch_size=2, batch_format="numpy", shuffle_buffer_size=2)
    assert not shuffled.takes_plain
