"""The same batches as Ray Data yields, for many kinds of columns, cut in many ways."""

import datetime
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
from ray.data import Dataset
from ray.data.extensions import ArrowTensorArray, TensorArray

from asyncsplit.pipeline import Pipeline, RowPipeline
from tests.same import assert_same, feed

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray's own constructor sets a field that Ray has deprecated.
    pytest.mark.filterwarnings("ignore:.use_push_based_shuffle:DeprecationWarning"),
    # Ray's accessors use what the newest pandas has deprecated.
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame"),
]

ROWS = 28
"""In blocks of 7, 0, 1, 15 and 5 rows."""
CUTS = (0, 7, 7, 8, 23, 28)

SIZES: list[tuple[int | None, bool]] = [
    (None, False),
    (1, False),
    (3, False),
    (10, True),
    (10, False),
    (256, False),
    (256, True),
]
FORMATS = ("default", "pandas", "pyarrow", None)


def split(table: pa.Table) -> list[pa.Table]:
    return [table.slice(a, b - a) for a, b in pairwise(CUTS)]


def arrow(values: list[Any], kind: pa.DataType | None = None) -> list[pa.Table]:
    """Blocks of one column of these values over and over, beside one of plain integers."""
    column = pa.array([values[i % len(values)] for i in range(ROWS)], kind)
    return split(pa.table({"x": column, "row": pa.array(range(ROWS))}))


def wrapped(array: pa.Array) -> list[pa.Table]:
    return split(pa.table({"x": array, "row": pa.array(range(ROWS))}))


def framed(values: Any) -> list[Any]:
    frame = pd.DataFrame({"x": values, "row": np.arange(ROWS)})
    return [frame[a:b].reset_index(drop=True) for a, b in pairwise(CUTS)]


def repeated(values: list[Any]) -> list[Any]:
    return [values[i % len(values)] for i in range(ROWS)]


def nulls_in_one_block() -> list[pa.Table]:
    values: list[int | None] = list(range(ROWS))
    values[12] = None
    return arrow(values, pa.int32())


def in_chunks(kind: str) -> list[pa.Table]:
    def piece(start: int, rows: int) -> pa.Table:
        numbers = range(start, start + rows)
        if kind == "dictionary":
            strings = pa.array([f"{start}-{i % 2}" for i in numbers], pa.string())
            column = strings.dictionary_encode()
        elif kind == "tensor":
            column = ArrowTensorArray.from_numpy(np.arange(rows * 4.0).reshape(rows, 2, 2))
        else:
            column = pa.array(numbers, pa.float32())
        strings = pa.array([str(i) for i in numbers], pa.string())
        return pa.table({"x": column, "s": strings})

    one = pa.concat_tables([piece(0, 5), piece(5, 1), piece(6, 0), piece(6, 14), piece(20, 2)])
    return [one, pa.concat_tables([piece(22, 3), piece(25, 9)]), piece(34, 3)]


def large_in_chunks() -> list[pa.Table]:
    """Larger than a window, in many chunks."""
    pieces = [pa.table({"x": np.arange(i, i + 999) * 0.5}) for i in range(0, 299_700, 999)]
    return [pa.concat_tables(pieces), pa.concat_tables(pieces[:3])]


def unlike_types() -> list[pa.Table]:
    return [
        pa.table({"x": pa.array([1, 2, 3], pa.int32()), "y": ["a", "b", "c"]}),
        pa.table({"x": pa.array([4.5, 5, 6, 7], pa.float64()), "y": ["d", None, "f", "g"]}),
        pa.table({"y": ["h", "i"], "z": [True, None], "x": pa.array([8, 9], pa.int8())}),
        pa.table({"x": pa.nulls(4), "y": pa.nulls(4, pa.string())}),
    ]


def unlike_tensors() -> list[pa.Table]:
    return [
        pa.table({"x": ArrowTensorArray.from_numpy(np.arange(12.0).reshape(3, 2, 2))}),
        pa.table({"x": ArrowTensorArray.from_numpy(np.arange(45.0).reshape(5, 3, 3))}),
    ]


def native_tensors() -> list[pa.Table]:
    values = np.arange(ROWS * 6, dtype=np.int16).reshape(ROWS, 2, 3)
    return wrapped(pa.FixedShapeTensorArray.from_numpy_ndarray(values))


def ragged_tensors() -> list[pa.Table]:
    values = np.empty(ROWS, object)
    values[:] = [np.full((i % 3 + 1, 2), float(i)) for i in range(ROWS)]
    return wrapped(ArrowTensorArray.from_numpy(values))


def odd_index() -> list[pd.DataFrame]:
    return [
        pd.DataFrame({"x": np.arange(4)}, index=[5, 3, 9, 1]),
        pd.DataFrame({"x": np.arange(6)}, index=list("abcdef")),
    ]


def strided() -> list[pd.DataFrame]:
    return [pd.DataFrame(np.arange(40.0).reshape(20, 2), columns=["x", "y"]) for _ in range(2)]


def unlike_frames() -> list[pd.DataFrame]:
    return [
        pd.DataFrame({"x": [1, 2, 3], "y": [True, False, True]}),
        pd.DataFrame({"x": [1.5, None, 3.0, 4.0], "y": [None, True, False, True]}),
    ]


UTC = datetime.UTC
DAY = datetime.datetime(2024, 2, 29, 12, 30, 1, 7)

TABLES: dict[str, Callable[[], list[Any]]] = {
    "int64": lambda: arrow(list(range(5))),
    "uint8": lambda: arrow([0, 255, 3], pa.uint8()),
    "float16": lambda: wrapped(pa.array(np.arange(ROWS, dtype=np.float16))),
    "float64 with NaN": lambda: arrow([1.0, float("nan"), -0.0], pa.float64()),
    "float with nulls": lambda: arrow([1.0, None, 2.5, 3.5], pa.float32()),
    "int with nulls": lambda: arrow([1, 2, 3, None], pa.int64()),
    "int with nulls in one block": nulls_in_one_block,
    "bool": lambda: arrow([True, False, False]),
    "bool with nulls": lambda: arrow([True, False, None, True, True]),
    "string": lambda: arrow(["a", "bb", "", "ünï"]),
    "string with nulls": lambda: arrow(["a", None, "c"]),
    "large_string": lambda: arrow(["a", "b", None], pa.large_string()),
    "binary": lambda: arrow([b"a", b"", None], pa.binary()),
    "fixed size binary": lambda: arrow([b"ab", b"cd"], pa.binary(2)),
    "timestamp ns": lambda: arrow([1, 10**18], pa.timestamp("ns")),
    "timestamp us": lambda: arrow([DAY, DAY], pa.timestamp("us")),
    "timestamp with nulls": lambda: arrow([DAY, None, DAY], pa.timestamp("us")),
    "timestamp tz": lambda: arrow([DAY.replace(tzinfo=UTC)], pa.timestamp("us", "Europe/Paris")),
    "date32": lambda: arrow([DAY.date()], pa.date32()),
    "date64": lambda: arrow([DAY.date()], pa.date64()),
    "time64": lambda: arrow([DAY.time()], pa.time64("us")),
    "duration": lambda: arrow([datetime.timedelta(seconds=3)], pa.duration("ms")),
    "decimal": lambda: arrow([Decimal("1.50"), None, Decimal("-2.25")], pa.decimal128(9, 2)),
    "list": lambda: arrow([[1, 2], [3, 4]], pa.list_(pa.int64())),
    "ragged list": lambda: arrow([[1.5], [], None, [2.5, 3.5]], pa.list_(pa.float64())),
    "fixed size list": lambda: arrow([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
    "struct": lambda: arrow([{"a": 1, "b": "x"}, {"a": None, "b": "y"}, None]),
    "nested": lambda: arrow([[{"a": [1, 2]}, {"a": []}], []]),
    "map": lambda: arrow([[("k", 1)], []], pa.map_(pa.string(), pa.int32())),
    "dictionary": lambda: wrapped(pa.array(repeated(["p", "q", "r"])).dictionary_encode()),
    "dictionary of ints": lambda: wrapped(pa.array(repeated([7, 8])).dictionary_encode()),
    "null": lambda: arrow([None]),
    "tensor": lambda: wrapped(
        ArrowTensorArray.from_numpy(np.arange(ROWS * 4, dtype=np.float32).reshape(ROWS, 2, 2))
    ),
    "tensor of bools": lambda: wrapped(
        ArrowTensorArray.from_numpy(np.arange(ROWS * 3).reshape(ROWS, 3) % 2 == 0)
    ),
    "native tensor": native_tensors,
    "ragged tensor": ragged_tensors,
    "tensors of unlike shapes": unlike_tensors,
    "zero rows": lambda: [pa.table({"x": pa.array([], pa.int64())})] * 2,
    "zero columns": lambda: [pa.table({"x": [1, 2, 3]}).select([]), pa.table({"x": [4]})],
    "chunks": lambda: in_chunks("float"),
    "chunks of a dictionary": lambda: in_chunks("dictionary"),
    "chunks of tensors": lambda: in_chunks("tensor"),
    "large and in chunks": large_in_chunks,
    "unlike types": unlike_types,
    "pandas int": lambda: framed(np.arange(ROWS)),
    "pandas float32": lambda: framed(np.arange(ROWS, dtype=np.float32)),
    "pandas bool": lambda: framed(np.arange(ROWS) % 3 == 0),
    "pandas datetime": lambda: framed(pd.date_range("2024-01-01", periods=ROWS)),
    "pandas datetime tz": lambda: framed(pd.date_range("2024-01-01", periods=ROWS, tz="UTC")),
    "pandas nullable": lambda: framed(pd.array(repeated([1, None, 3]), dtype="Int64")),
    "pandas arrow": lambda: framed(pd.array(repeated([1, None]), dtype="int64[pyarrow]")),
    "pandas strings": lambda: framed(repeated(["a", None, "c"])),
    "pandas objects": lambda: framed(pd.Series(repeated([1, "a", None, 2.5]), dtype=object)),
    "pandas categories": lambda: framed(pd.Categorical(repeated(["a", "b", None]))),
    "pandas arrays": lambda: framed(repeated([np.zeros(2), np.ones(2)])),
    "pandas tensors": lambda: framed(TensorArray(np.arange(ROWS * 4).reshape(ROWS, 2, 2))),
    "pandas odd index": odd_index,
    "pandas strided": strided,
    "pandas unlike types": unlike_frames,
    "pandas zero columns": lambda: [pd.DataFrame(index=range(5)), pd.DataFrame(index=range(4))],
}


def dataset_of(blocks: list[Any]) -> Dataset:
    make = ray.data.from_pandas if isinstance(blocks[0], pd.DataFrame) else ray.data.from_arrow
    ds = make(blocks)
    bundles = list(ds.iter_internal_ref_bundles())
    # The blocks are there: an executor for each of many iterations would only take time.
    ds._execute_to_iterator = lambda **_: (iter(bundles), None, None)  # type: ignore[method-assign]
    return ds


def fetch(ds: Dataset) -> list[Any]:
    refs = [ref for bundle in ds.iter_internal_ref_bundles() for ref in bundle.block_refs]
    return cast("list[Any]", ray.get(cast("Any", refs)))


@pytest.mark.parametrize("name", TABLES)
def test_batches_are_those_of_ray_data(name: str) -> None:
    ds = dataset_of(TABLES[name]())
    for batch_format in FORMATS:
        for batch_size, drop_last in SIZES:
            if name == "large and in chunks" and batch_size != 256:
                continue
            theirs = list(
                ds.iterator().iter_batches(
                    batch_size=cast("int", batch_size),
                    batch_format=batch_format,
                    drop_last=drop_last,
                )
            )
            pipeline = Pipeline(
                batch_size=batch_size, batch_format=batch_format, drop_last=drop_last
            )
            ours = list(feed(pipeline, fetch(ds)))
            assert len(ours) == len(theirs) == pipeline.batches_out
            assert_same(ours, theirs)


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_those_of_ray_data(name: str) -> None:
    ds = dataset_of(TABLES[name]())
    pipeline = RowPipeline()
    ours = list(feed(pipeline, fetch(ds)))
    assert_same(ours, list(ds.iterator().iter_rows()))
    assert pipeline.rows_out == pipeline.batches_out == len(ours)


NOT_TO_SHUFFLE = {
    # What Ray makes of a value depends on the other values in a block.
    "unlike types",
    "pandas unlike types",
    "pandas objects",
    # Too many to compare.
    "large and in chunks",
}


@pytest.mark.parametrize("name", [name for name in TABLES if name not in NOT_TO_SHUFFLE])
def test_shuffled_batches_have_every_row_once(name: str) -> None:
    blocks = TABLES[name]()
    wanted = Counter(map(repr, feed(RowPipeline(), blocks)))
    for batch_size, buffer_size in ((3, 8), (256, 1)):
        pipeline = Pipeline(
            batch_size=batch_size,
            batch_format=None,
            shuffle_buffer_size=buffer_size,
            shuffle_seed=1,
        )
        batches = list(feed(pipeline, blocks))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        assert Counter(map(repr, feed(RowPipeline(), batches))) == wanted


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_nulls_in_a_dictionary_stay_nulls(batch_size: int) -> None:
    # Ray Data puts the last value of the dictionary in their place.
    values = repeated(["p", None, "q"])
    blocks = wrapped(pa.array(values).dictionary_encode())
    pipeline = Pipeline(batch_size=batch_size, batch_format="numpy")
    assert [x for batch in feed(pipeline, blocks) for x in batch["x"]] == values


def test_pandas_and_arrow_blocks_in_one_batch_become_arrow() -> None:
    # Ray Data fails an assertion.
    blocks = [pa.table({"x": [1, 2]}), pd.DataFrame({"x": [2.5]}), pa.table({"x": [4]})]
    (batch,) = feed(Pipeline(batch_size=256, batch_format=None), blocks)
    assert batch.equals(pa.table({"x": [1, 2, 2.5, 4]}))
