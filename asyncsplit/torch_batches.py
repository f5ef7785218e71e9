"""Batches of PyTorch tensors; this module imports torch.

Upstream: ``iter_torch_batches`` in ``ray/data/iterator.py`` and ``DefaultFinalizeFn`` in
``ray/data/_internal/utils/torch_utils.py``.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
from ray.data.block import BlockAccessor
from ray.data.collate_fn import is_tensor_batch_type
from ray.data.util.torch_utils import convert_ndarray_to_torch_tensor, move_tensors_to_device
from torch.utils.data import IterableDataset, get_worker_info

from asyncsplit import engine
from asyncsplit.collate import Recipe, input_format
from asyncsplit.formats import Array

if TYPE_CHECKING:
    from asyncsplit.stream import BatchStream

Dtypes = torch.dtype | dict[str, torch.dtype] | None


def _silence_warning_of_read_only_arrays() -> None:
    # Torch warns once in a process that writing to such a tensor is undefined. As upstream, tensors
    # share the memory of blocks, which is read-only. A filter set around each conversion, as
    # upstream does it, is not safe in threads.
    array = np.zeros(1)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.as_tensor(array)


_silence_warning_of_read_only_arrays()


def recipe(
    *,
    dtypes: Dtypes,
    device: "str | int | torch.device | Literal['auto']",
    collate_fn: Callable[[Any], Any] | None,
    pin_memory: bool,
) -> Recipe:
    """Return how to make what ``iter_torch_batches`` yields; arguments as there.

    Raises:
        TypeError: If ``collate_fn`` cannot be called in a thread.
        ValueError: If it is combined with ``dtypes``.
    """
    if collate_fn is not None and dtypes is not None:
        raise ValueError(
            f"collate_fn={collate_fn!r} cannot be combined with dtypes={dtypes!r}: convert to the"
            " dtypes you want in the collate_fn"
        )
    target = resolve_device(device)
    steps: list[Callable[[Any], Any]] = []
    if pin_memory:
        steps.append(_pin_tensors)
    if collate_fn is None:
        if target.type == "cpu" and not pin_memory and dtypes is None:
            return Recipe("numpy", _ToTensors(None), in_loop=True, pandas_as_arrow=True)
        steps = [_ToTensors(dtypes), *steps, _Move(target)]
        return Recipe("numpy", _Chain(steps), pandas_as_arrow=True)
    return Recipe(input_format(collate_fn), _Chain([collate_fn, *steps, _Move(target)]))


def resolve_device(device: "str | int | torch.device") -> torch.device:
    """Return the device that "auto" and an unnumbered "cuda" stand for where this is called."""
    if device == "auto":
        if not engine.in_train_worker():
            return torch.device("cpu")
        from ray.train.torch import get_device

        device = get_device()
    resolved = torch.device(device)
    if resolved.type == "cuda" and resolved.index is None and torch.cuda.is_available():
        # Without a number it would be the current device of a thread of ours.
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


class _ToTensors:
    """Make a dict of tensors, which share memory with the arrays where the dtype stays."""

    def __init__(self, dtypes: Dtypes) -> None:
        self._dtypes = dtypes

    def __call__(self, batch: Any) -> dict[str, torch.Tensor]:
        arrays: dict[str, Array] = batch
        if isinstance(batch, pa.Table):
            arrays = cast("dict[str, Array]", BlockAccessor.for_block(batch).to_numpy())
        dtypes = self._dtypes
        if isinstance(dtypes, dict):
            if missing := arrays.keys() - dtypes.keys():
                raise ValueError(
                    f"dtypes has none for columns {sorted(missing)}: give each of"
                    f" {sorted(arrays)} one, or one dtype for all"
                )
            return {name: _tensor(array, dtypes[name]) for name, array in arrays.items()}
        return {name: _tensor(array, dtypes) for name, array in arrays.items()}


def _tensor(array: Array, dtype: torch.dtype | None) -> torch.Tensor:
    if array.dtype == object:
        # Tensors of one shape, or an error that says what to do.
        return convert_ndarray_to_torch_tensor(array, dtype=dtype)
    return torch.as_tensor(array, dtype=dtype)


class _Chain:
    """Do one step after the other; nothing but the present result is kept."""

    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self._steps = steps

    def __call__(self, batch: Any) -> Any:
        for step in self._steps:
            batch = step(batch)
        return batch


class _Move:
    """Move tensors to a device, and join those of one feature; leave anything else alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, batch: Any) -> Any:
        if is_tensor_batch_type(batch):
            return move_tensors_to_device(batch, device=self._device)
        return batch


def _pin_tensors(batch: Any) -> Any:
    return _pin(batch) if is_tensor_batch_type(batch) else batch


@torch.no_grad()
def _pin(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.pin_memory() if batch.device.type == "cpu" and not batch.is_pinned() else batch
    if isinstance(batch, Mapping):
        return {name: _pin(value) for name, value in batch.items()}
    return type(batch)(map(_pin, batch))


class TorchIterableDataset(IterableDataset[Any]):
    """One split for a `torch.utils.data.DataLoader`: each iteration is an epoch of batches."""

    def __init__(self, stream: "Callable[[], BatchStream[Any]]") -> None:
        """Use `AsyncDataIterator.to_torch_dataset` instead."""
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        """Iterate one epoch; blocks the thread while it waits.

        Raises:
            RuntimeError: In a worker process of a loader.
        """
        if (worker := get_worker_info()) is not None:
            raise RuntimeError(
                f"num_workers={worker.num_workers}: each worker of the DataLoader would be another"
                " consumer of the split, and a forked process cannot use Ray. Use num_workers=0:"
                " blocks are fetched, and batches collated, beside the loop anyway, and"
                " prefetch_batches says how many ahead"
            )
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        with self._stream() as stream:
            yield from stream
