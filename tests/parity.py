"""Write docs/parity.md: what `ray.data.DataIterator` has, and what is in its place here.

Methods and arguments come from the classes themselves, reasons from the tables below. A method or
argument that neither we have nor a reason is given for is an error.

    .venv/bin/python -m tests.parity > docs/parity.md
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import DataIterator

from asyncsplit import AsyncDataIterator

SYNC = "there by [`as_data_iterator()`](../asyncsplit/sync.py), which has Ray's own"

METHODS = {
    "to_torch": f"not async: deprecated by Ray; {SYNC}. For a `DataLoader` there is"
    " `to_torch_dataset`",
    "to_tf": f"not async: a `tf.data.Dataset` pulls from a plain iterator; {SYNC}",
}
"""Why there is no such method, and what to use."""

NOTES = {
    "iter_batches": "a `BatchStream`, for `async for` and for `for`",
    "iter_rows": "a `BatchStream` of dicts",
    "iter_torch_batches": "casts, `collate_fn`, pinning and moves run in threads beside the loop;"
    " without them, tensors are views of blocks, made where the loop asks",
    "iter_jax_batches": "arrays are made in threads beside the loop; with several JAX processes,"
    " where the loop asks",
    "iter_tf_batches": "tensors are made in threads beside the loop",
    "materialize": "its blocks are copies that the caller owns",
    "stats": "followed by a section of asyncsplit's own",
    "schema": "has `during_execution`, for what to do while an epoch runs",
    "get_context": "a copy",
}
"""What a reader should know of a method that is there."""

ARGUMENTS = {
    ("iter_torch_batches", "device"): '`"auto"` does not import `ray.train`: where nobody has,'
    " it is the CPU",
    ("iter_torch_batches", "collate_fn"): "plain functions are welcome, where Ray warns;"
    " a coroutine function is a TypeError",
    ("iter_jax_batches", "synchronize_batches"): "a ValueError in one of several JAX processes:"
    " split with `equal=True`, so that all have batches of the same shapes. Or use it there:"
    " `as_data_iterator()` has Ray's own",
    ("iter_batches", "local_shuffle_buffer_size"): "only the last batch can be short, where Ray"
    " has short ones in the middle",
}
"""How an argument differs, of those whose meaning is not Ray's in every case."""

SAME = "same"


def methods(cls: type) -> dict[str, Callable[..., Any]]:
    """Return a class's public methods by name."""
    return {
        name: member
        for name, member in inspect.getmembers(cls, callable)
        if not name.startswith("_")
    }


def arguments(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return a method's arguments by name, without self."""
    parameters = dict(inspect.signature(method).parameters)
    parameters.pop("self", None)
    return parameters


def rows() -> Iterator[tuple[str, str]]:
    """Yield what Ray has, and what is here.

    Raises:
        LookupError: If it is neither here nor left out for a reason.
    """
    ours = methods(AsyncDataIterator)
    for name, theirs in methods(DataIterator).items():
        if name not in ours:
            if name not in METHODS:
                raise LookupError(
                    f"ray.data.DataIterator.{name} of Ray {ray.__version__} is neither in"
                    " AsyncDataIterator nor in tests/parity.py"
                )
            yield f"`{name}`", METHODS[name]
            continue
        kind = "async" if inspect.iscoroutinefunction(ours[name]) else SAME
        yield f"`{name}`", f"{kind}: {NOTES[name]}" if name in NOTES else kind
        here = arguments(ours[name])
        for argument, parameter in arguments(theirs).items():
            difference = _difference(name, argument, parameter, here.get(argument))
            yield f"`{name}({argument})`", difference


def _difference(
    name: str, argument: str, theirs: inspect.Parameter, ours: inspect.Parameter | None
) -> str:
    if ours is not None and (ours.kind, ours.default) != (theirs.kind, theirs.default):
        raise LookupError(f"{name}({argument}) is {theirs} in Ray {ray.__version__}, {ours} here")
    reason = ARGUMENTS.get((name, argument))
    if ours is None and reason is None:
        raise LookupError(
            f"ray.data.DataIterator.{name} of Ray {ray.__version__} takes {argument}, and"
            " AsyncDataIterator does not, nor does tests/parity.py say why"
        )
    return SAME if reason is None else f"differs: {reason}"


def page() -> str:
    """Return the page."""
    minor = ".".join(ray.__version__.split(".")[:2])
    lines = [
        "# Parity with `ray.data.DataIterator`",
        "",
        f"What the public methods of `ray.data.DataIterator` in Ray {minor} are in",
        "`AsyncDataIterator`, with every argument. *same*: the same name, default and meaning, and",
        "a stream where Ray returns an iterable. *async*: the same, awaited.",
        "",
        "Made by `.venv/bin/python -m tests.parity > docs/parity.md`. A test fails when Ray has",
        "something that is not here",
        "([test_the_page_is_that_of_the_classes](../tests/unit/test_data_iterator.py)).",
        "That tensors are the same, side by side for 60 kinds of columns, shows",
        "[test_tensors_are_those_of_ray_data](../tests/unit/test_tensors.py).",
        "",
        f"| `ray.data.DataIterator`, Ray {minor} | `asyncsplit.AsyncDataIterator` |",
        "|---|---|",
        *(f"| {theirs} | {ours} |" for theirs, ours in rows()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
