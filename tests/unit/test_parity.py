"""Equal rows are equal numbers of batches, on every way from the router to the loop."""

from collections.abc import Callable, Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncsplit.core.routing import Equal, Part, make_router
from asyncsplit.pipeline import Pipeline, RowPipeline
from tests.profiles import FEWER

sizes_of_blocks = st.lists(st.integers(1, 40), max_size=12)
ways_to_share = st.sampled_from((True, "pad"))


def shares(sizes: Sequence[int], n: int, equal: Equal) -> list[list[Part]]:
    """Return what each of n splits gets of blocks of these sizes."""
    router = make_router(n, equal=equal, routing="rows")
    first = 0
    got: list[list[Part]] = [[] for _ in range(n)]
    for rows in sizes:
        router.add(Part(pa.table({"id": range(first, first + rows)}), 0, rows, 8 * rows))
        first += rows
        for split, part in router.assign(()):
            got[split].append(part)
    router.finish()
    for split, part in router.assign(()):
        got[split].append(part)
    return got


def add(pipeline: Pipeline, part: Part) -> None:
    pipeline.add(part.block, part.start, part.stop, padding=part.padding)


def read(pipeline: Pipeline, share: Sequence[Part]) -> list[list[int]]:
    """Return the ids in each of a share's batches, and check what is said of their padding."""
    todo = iter(share)
    out: list[list[int]] = []
    seen: set[int] = set()
    for batch in pipeline.batches:
        if batch is not None:
            ids = batch["id"]
            out.append([ids] if isinstance(ids, int) else ids.tolist())
            seen.update(out[-1])
            repeated = pipeline.rows_out - len(seen)
            assert repeated <= pipeline.padded_rows <= pipeline.rows_out
        elif (part := next(todo, None)) is not None:
            add(pipeline, part)
        else:
            pipeline.finish()
    return out


ways_to_read: list[Callable[[int, bool, int], Pipeline]] = [
    lambda size, drop, seed: Pipeline(batch_size=size, batch_format="numpy", drop_last=drop),
    lambda size, drop, seed: Pipeline(
        batch_size=size,
        batch_format="numpy",
        drop_last=drop,
        shuffle_buffer_size=2 * size,
        shuffle_seed=seed,
    ),
    lambda size, drop, seed: RowPipeline(),
]


@pytest.mark.parametrize("pipeline", ways_to_read, ids=["in order", "shuffled", "rows"])
@FEWER
@given(
    sizes=sizes_of_blocks,
    n=st.integers(1, 5),
    equal=ways_to_share,
    batch_size=st.integers(1, 30),
    drop_last=st.booleans(),
)
def test_all_splits_get_as_many_batches_of_the_same_sizes(
    pipeline: Callable[[int, bool, int], Pipeline],
    sizes: list[int],
    n: int,
    equal: Equal,
    batch_size: int,
    drop_last: bool,
) -> None:
    pipelines = [pipeline(batch_size, drop_last, split) for split in range(n)]
    batches = [
        [len(batch) for batch in read(*each)]
        for each in zip(pipelines, shares(sizes, n, equal), strict=True)
    ]
    assert all(each == batches[0] for each in batches)
    assert len({(p.rows_out, p.rows_dropped, p.batches_out) for p in pipelines}) == 1
    if not pipelines[0].rows_dropped:
        padded = -sum(sizes) % n if equal == "pad" else 0
        assert sum(p.padded_rows for p in pipelines) == padded


@FEWER
@given(sizes=sizes_of_blocks, n=st.integers(1, 5), batch_size=st.integers(1, 30))
def test_in_order_the_last_rows_of_a_batch_are_the_padding(
    sizes: list[int], n: int, batch_size: int
) -> None:
    """So an evaluation that leaves them out has seen each row exactly once."""
    seen: list[int] = []
    for share in shares(sizes, n, "pad"):
        pipeline = Pipeline(batch_size=batch_size, batch_format="numpy")
        padded = 0
        parts = iter(share)
        for batch in pipeline.batches:
            if batch is not None:
                more = pipeline.padded_rows - padded
                seen += batch["id"][: len(batch["id"]) - more].tolist()
                padded += more
            elif (part := next(parts, None)) is not None:
                add(pipeline, part)
            else:
                pipeline.finish()
    assert sorted(seen) == list(range(sum(sizes)))


@FEWER
@given(
    sizes=sizes_of_blocks,
    n=st.integers(1, 5),
    batch_size=st.integers(1, 10),
    cut=st.floats(0, 1),
)
def test_a_resumed_shuffle_counts_the_padding_it_delivers(
    sizes: list[int], n: int, batch_size: int, cut: float
) -> None:
    """Each of the two pipelines counts its own, and both together have all."""

    def pipeline() -> Pipeline:
        return Pipeline(
            batch_size=batch_size, batch_format="numpy", shuffle_buffer_size=7, shuffle_seed=3
        )

    for share in shares(sizes, n, "pad"):
        whole, first = pipeline(), pipeline()
        batches = read(whole, share)
        todo = iter(share)
        at = int(cut * len(batches))
        while first.batches_out < at:
            if next(first.batches) is None:
                part = next(todo, None)
                add(first, part) if part else first.finish()
        second = pipeline()
        oldest = first.oldest_unfinished or 0
        skipped = [part.rows for part in share[:oldest]]
        second.resume(skipped, first.rows_out)
        assert read(second, share[oldest:]) == batches[at:]
        assert first.padded_rows + second.padded_rows == whole.padded_rows
