"""Batches: the ways to iterate a split, with the arguments of `ray.data.DataIterator`.

Frameworks take seconds to import, so each is imported when batches of its tensors are asked for. To
keep an event loop free of that, import it before the loop runs, as a training script does anyway;
with JAX, have it look for devices too: ``jax.devices()``.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncsplit.collate import Collated, Converted, Recipe
from asyncsplit.consumer import Consumer
from asyncsplit.formats import resolve_batch_format
from asyncsplit.pipeline import Pipeline, RowPipeline
from asyncsplit.stream import BatchStream

if TYPE_CHECKING:
    import torch

    from asyncsplit.torch_batches import TorchIterableDataset


class Batches:
    """The part of `AsyncDataIterator` that makes streams."""

    _consumer: Consumer

    def iter_batches(
        self,
        *,
        prefetch_batches: int = 1,
        batch_size: int | None = 256,
        batch_format: str | None = "default",
        drop_last: bool = False,
        local_shuffle_buffer_size: int | None = None,
        local_shuffle_seed: int | None = None,
    ) -> BatchStream[Any]:
        """Return a stream of this split's batches; arguments as `ray.data.DataIterator`'s.

        Nothing happens before the first batch is asked for; then the stream waits until all
        splits have arrived, and an epoch begins.

        Args:
            prefetch_batches: How many batches' blocks to fetch ahead; 0 to fetch nothing ahead.
            batch_size: Rows in a batch; None for whole blocks.
            batch_format: ``"default"`` or ``"numpy"`` for a dict of arrays, ``"pandas"``,
                ``"pyarrow"``, or None for blocks as they are.
            drop_last: Drop the last batch if it is not full.
            local_shuffle_buffer_size: Shuffle rows in a buffer of at least so many rows.
            local_shuffle_seed: Seed of that shuffle; the same in each epoch.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument's value is not allowed.
        """
        return self._stream(
            partial(Pipeline, batch_format=resolve_batch_format(batch_format)),
            prefetch_batches=prefetch_batches,
            batch_size=batch_size,
            drop_last=drop_last,
            local_shuffle_buffer_size=local_shuffle_buffer_size,
            local_shuffle_seed=local_shuffle_seed,
        )

    def iter_rows(self) -> BatchStream[dict[str, Any]]:
        """Return a stream of this split's rows, each a dict."""
        return BatchStream(self._consumer, RowPipeline, prefetch_batches=1, batch_size=None)

    def iter_torch_batches(
        self,
        *,
        prefetch_batches: int = 1,
        batch_size: int | None = 256,
        dtypes: "torch.dtype | dict[str, torch.dtype] | None" = None,
        device: "str | int | torch.device" = "auto",
        collate_fn: Callable[[Any], Any] | None = None,
        drop_last: bool = False,
        local_shuffle_buffer_size: int | None = None,
        local_shuffle_seed: int | None = None,
        pin_memory: bool = False,
    ) -> BatchStream[Any]:
        """Return a stream of batches of PyTorch tensors; arguments as `ray.data.DataIterator`'s.

        A batch is a dict of tensors. On the CPU they share the memory of blocks where their dtypes
        allow: never write to them, because others read it too.

        Casts, ``collate_fn``, pinning and moving to a device run in up to four threads of the
        stream's own, ``prefetch_batches`` batches ahead of the loop, in order. An error in them is
        raised in the place of the batch, and ends the stream. Leaving the loop ends the threads, as
        soon as a ``collate_fn`` that is running returns.

        Args:
            prefetch_batches: How many batches' blocks to fetch ahead, and batches to make ahead;
                0 to do so when the loop asks, and only beside other tasks.
            batch_size: Rows in a batch; None for whole blocks.
            dtypes: The dtype of all tensors, or of each by its column; as in the data if None.
            device: Where tensors are to be; "auto" for the device of Ray Train, or else the CPU.
            collate_fn: Makes what the loop gets of a batch: an ``ArrowBatchCollateFn``,
                ``NumpyBatchCollateFn`` or ``PandasBatchCollateFn`` of `ray.data.collate_fn`, or a
                function of a dict of arrays. It may be called in several threads at once. Tensors
                in what it returns are moved to ``device``.
            drop_last: Drop the last batch if it is not full.
            local_shuffle_buffer_size: Shuffle rows in a buffer of at least so many rows.
            local_shuffle_seed: Seed of that shuffle; the same in each epoch.
            pin_memory: Pin the memory of tensors that are on the CPU.

        Raises:
            ImportError: If torch is not installed.
            TypeError: If an argument has the wrong type; a coroutine function is no ``collate_fn``.
            ValueError: If an argument's value is not allowed, or goes with no ``collate_fn``.
        """
        from asyncsplit import torch_batches

        recipe = torch_batches.recipe(
            dtypes=dtypes, device=device, collate_fn=collate_fn, pin_memory=pin_memory
        )
        return self._convert(
            recipe,
            prefetch_batches=prefetch_batches,
            batch_size=batch_size,
            drop_last=drop_last,
            local_shuffle_buffer_size=local_shuffle_buffer_size,
            local_shuffle_seed=local_shuffle_seed,
        )

    def to_torch_dataset(self, **arguments: Any) -> "TorchIterableDataset":
        """Return a `torch.utils.data.IterableDataset` of the batches of `iter_torch_batches`.

        For a ``DataLoader(dataset, batch_size=None)``: one with ``num_workers`` raises
        RuntimeError, because each worker process would be another consumer of this split.
        Arguments and errors are those of `iter_torch_batches`. It blocks while it waits.
        """
        from asyncsplit.torch_batches import TorchIterableDataset

        self.iter_torch_batches(**arguments)
        return TorchIterableDataset(partial(self.iter_torch_batches, **arguments))

    def iter_jax_batches(
        self,
        *,
        prefetch_batches: int = 1,
        batch_size: int = 256,
        dtypes: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        drop_last: bool = False,
        local_shuffle_buffer_size: int | None = None,
        local_shuffle_seed: int | None = None,
        synchronize_batches: bool = False,
        paddings: int | float | bool | dict[str, int | float | bool] | None = None,
    ) -> BatchStream[Any]:
        """Return a stream of batches of JAX arrays; arguments as `ray.data.DataIterator`'s.

        A batch is a dict of arrays, whose rows are shared out among all JAX devices. They are made
        in threads, as those of `iter_torch_batches` are; with several JAX processes, which have to
        begin computations in the same order, where the loop asks.

        Args:
            prefetch_batches: How many batches' blocks to fetch ahead, and batches to make ahead.
            batch_size: Rows in a batch, for this process: a multiple of its number of devices.
            dtypes: The dtype of all arrays, or of each by its column; as in the data if None.
            collate_fn: Makes an array or a dict of arrays of a batch; an object as for
                `iter_torch_batches`, but no function.
            drop_last: Drop the last batch if it is not full.
            local_shuffle_buffer_size: Shuffle rows in a buffer of at least so many rows.
            local_shuffle_seed: Seed of that shuffle; the same in each epoch.
            synchronize_batches: Without effect in a single JAX process; an error in one of several.
            paddings: What to fill the last batch up with, for all columns or for each.

        Raises:
            ImportError: If jax is not installed.
            TypeError: If an argument has the wrong type.
            ValueError: If an argument's value is not allowed. Also instead of a last batch whose
                rows cannot be shared out, if there are no ``paddings``.
        """
        _at_least(1, batch_size=batch_size)
        from asyncsplit import jax_batches

        recipe = jax_batches.recipe(
            batch_size=batch_size,
            dtypes=dtypes,
            collate_fn=collate_fn,
            drop_last=drop_last,
            synchronize_batches=synchronize_batches,
            paddings=paddings,
        )
        return self._convert(
            recipe,
            prefetch_batches=prefetch_batches,
            batch_size=batch_size,
            drop_last=drop_last,
            local_shuffle_buffer_size=local_shuffle_buffer_size,
            local_shuffle_seed=local_shuffle_seed,
        )

    def iter_tf_batches(
        self,
        *,
        prefetch_batches: int = 1,
        batch_size: int | None = 256,
        dtypes: Any = None,
        drop_last: bool = False,
        local_shuffle_buffer_size: int | None = None,
        local_shuffle_seed: int | None = None,
    ) -> BatchStream[Any]:
        """Return a stream of batches of TensorFlow tensors; arguments as `ray.data.DataIterator`'s.

        A batch is a dict of tensors. They are made in threads, as those of `iter_torch_batches`.
        ``dtypes`` is the dtype of all tensors, or of each by its column; as in the data if None.

        Raises:
            ImportError: If tensorflow is not installed.
            TypeError: If an argument has the wrong type.
            ValueError: If an argument's value is not allowed.
        """
        from asyncsplit import tf_batches

        return self._convert(
            tf_batches.recipe(dtypes),
            prefetch_batches=prefetch_batches,
            batch_size=batch_size,
            drop_last=drop_last,
            local_shuffle_buffer_size=local_shuffle_buffer_size,
            local_shuffle_seed=local_shuffle_seed,
        )

    def _convert(
        self, recipe: Recipe, *, prefetch_batches: int, **arguments: Any
    ) -> BatchStream[Any]:
        pipeline = partial(recipe.pipeline, ahead=prefetch_batches)
        return self._stream(pipeline, prefetch_batches=prefetch_batches, **arguments)

    def _stream(
        self,
        pipeline: "Callable[..., Pipeline | Converted | Collated]",
        *,
        prefetch_batches: int,
        batch_size: int | None,
        drop_last: bool,
        local_shuffle_buffer_size: int | None,
        local_shuffle_seed: int | None,
    ) -> BatchStream[Any]:
        _at_least(0, prefetch_batches=prefetch_batches)
        if batch_size is not None:
            _at_least(1, batch_size=batch_size)
        if local_shuffle_buffer_size is not None:
            _at_least(1, local_shuffle_buffer_size=local_shuffle_buffer_size)
            if batch_size is None:
                raise ValueError(
                    f"local_shuffle_buffer_size={local_shuffle_buffer_size} needs a batch_size:"
                    " whole blocks cannot be shuffled"
                )
        if local_shuffle_seed is not None:
            _at_least(0, local_shuffle_seed=local_shuffle_seed)
        pipeline = partial(
            pipeline,
            batch_size=batch_size,
            drop_last=bool(drop_last),
            shuffle_buffer_size=local_shuffle_buffer_size,
            shuffle_seed=local_shuffle_seed,
        )
        return BatchStream(
            self._consumer, pipeline, prefetch_batches=prefetch_batches, batch_size=batch_size
        )


def _at_least(low: int, **argument: object) -> None:
    ((name, value),) = argument.items()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int")
    if value < low:
        raise ValueError(f"{name}={value} must be {low} or more")
