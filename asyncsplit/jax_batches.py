"""Batches of JAX arrays; this module imports jax.

Upstream: ``iter_jax_batches`` in ``ray/data/iterator.py`` and ``ray/data/util/jax_util.py``.
"""

from collections.abc import Callable
from typing import Any

import jax
from ray.data.collate_fn import CollateFn
from ray.data.util.jax_util import jax_sync_generator

from asyncsplit.collate import SKIPPED, Recipe, input_format


def recipe(
    *,
    batch_size: int,
    dtypes: Any,
    collate_fn: Callable[[Any], Any] | None,
    drop_last: bool,
    synchronize_batches: bool,
    paddings: Any,
) -> Recipe:
    """Return how to make what ``iter_jax_batches`` yields; arguments as there.

    Raises:
        TypeError: If ``collate_fn`` is no `CollateFn`.
        ValueError: If the devices cannot share ``batch_size``, or several processes of JAX are to
            agree on batches.
    """
    devices = jax.local_device_count()
    if batch_size % devices:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by the {devices} JAX devices of this"
            f" process: use a multiple of {devices}"
        )
    processes = jax.process_count()
    if synchronize_batches and processes > 1:
        raise ValueError(
            f"synchronize_batches=True is not supported with {processes} JAX processes: split with"
            " equal=True, which gives all of them batches of the same shapes"
        )
    if collate_fn is not None and not isinstance(collate_fn, CollateFn):
        input_format(collate_fn)
        raise TypeError(
            f"collate_fn={collate_fn!r} must be an object of a subclass of"
            " ray.data.collate_fn.ArrowBatchCollateFn, NumpyBatchCollateFn or PandasBatchCollateFn"
        )

    def convert(batch: Any) -> Any:
        if collate_fn is not None:
            batch = collate_fn(batch)
        arrays = jax_sync_generator([batch], drop_last, batch_size, paddings, dtypes)
        return next(arrays, SKIPPED)

    # Casting an array that several processes share is a computation that all have to begin in the
    # same order, beside their training steps. So no thread may begin one.
    return Recipe(
        "numpy" if collate_fn is None else input_format(collate_fn),
        convert,
        in_loop=processes > 1,
    )
