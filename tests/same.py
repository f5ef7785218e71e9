"""Feeding a pipeline, and comparing what comes out of it to the last bit."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from asyncsplit.pipeline import Pipeline


def feed(pipeline: Pipeline, blocks: Sequence[Any]) -> Iterator[Any]:
    """Yield a pipeline's batches, giving it a block whenever it asks for one."""
    todo = iter(blocks)
    for batch in pipeline.batches:
        if batch is not None:
            yield batch
        elif (block := next(todo, None)) is not None:
            no_columns = isinstance(block, pa.Table) and not block.num_columns
            pipeline.add(block, 0, 0 if no_columns else len(block))
        else:
            pipeline.finish()


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare values, types, dtypes, shapes, schemas and whether arrays may be written to."""
    assert type(ours) is type(theirs)
    if isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.flags.writeable == theirs.flags.writeable
        if ours.dtype == object:
            for a, b in zip(ours.ravel(), theirs.ravel(), strict=True):
                assert_same(a, b)
        else:
            np.testing.assert_array_equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name in ours:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(ours, pd.DataFrame):
        pd.testing.assert_frame_equal(ours, theirs, check_index_type="equiv", check_exact=True)
        assert [*map(type, ours.iloc[0])] == [*map(type, theirs.iloc[0])]
    elif isinstance(ours, pa.Table):
        ours.validate(full=True)
        assert ours.schema.equals(theirs.schema, check_metadata=True)
        if not ours.equals(theirs):
            assert_same(ours.to_pylist(), theirs.to_pylist())
    else:
        assert ours is theirs or ours == theirs or (ours != ours and theirs != theirs)
