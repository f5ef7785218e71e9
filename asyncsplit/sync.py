"""SyncDataIterator: a split as a `ray.data.DataIterator`, for code that knows no event loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.data import DataContext, DataIterator, Schema
from ray.data.dataset import MaterializedDataset

from asyncsplit.collate import Recipe
from asyncsplit.guard import DuringExecution
from asyncsplit.remote import answer_blocking
from asyncsplit.stream import BatchStream

if TYPE_CHECKING:
    from asyncsplit.iterator import AsyncDataIterator


class SyncDataIterator(DataIterator):
    """One split of a dataset, as Ray's own iterators are used; get it from `as_data_iterator`.

    What reads rows goes through the split's streams, so their guarantees hold: a batch is
    committed when the next one is asked for, a split has one consumer at a time, and one that
    died can be replaced. Each iteration is an epoch, for which all splits have to come.
    Everything blocks the thread it is called from; in an event loop, use the `AsyncDataIterator`.
    """

    def __init__(self, iterator: "AsyncDataIterator") -> None:
        """Read the split of an iterator, as the same consumer."""
        self.iterator = iterator
        """The iterator it was made of."""

    def __repr__(self) -> str:
        """Show which split this is."""
        return f"<{type(self).__name__} split={self.split_index} of {self.world_size()}>"

    @property
    def split_index(self) -> int:
        """Which split this is, from 0."""
        return self.iterator.split_index

    def world_size(self) -> int:
        """Return how many splits there are."""
        return self.iterator.world_size()

    def iter_rows(self) -> Iterable[dict[str, Any]]:
        """Return an iterable of this split's rows, each a dict."""
        return _Epochs(self.iterator.iter_rows)

    def iter_torch_batches(self, **arguments: Any) -> Iterable[Any]:
        """Return an iterable of batches of tensors; see `AsyncDataIterator.iter_torch_batches`."""
        return _Epochs(partial(self.iterator.iter_torch_batches, **arguments))

    def materialize(self) -> "MaterializedDataset[Any]":
        """Read one epoch of this split into a dataset, whose blocks this process owns."""
        blocks = self.iter_batches(batch_size=None, batch_format=None)  # type: ignore[arg-type]
        return cast("MaterializedDataset[Any]", ray.data.from_blocks(list(blocks)))

    def schema(self, *, during_execution: DuringExecution = "raise") -> Schema | None:
        """Return the dataset's schema; see `AsyncDataIterator.schema`."""
        schema: Schema | None = self._ask("get_dataset_schema", during_execution)
        return schema

    def get_context(self) -> DataContext:
        """Return a copy of the dataset's own `DataContext`."""
        context: DataContext = self._ask("get_dataset_context")
        return context

    def stats(self) -> str:
        """Return Ray Data's statistics of the last execution, and the split's own."""
        return str(self._ask("stats"))

    def state_dict(self, *, batch_finished: bool = False) -> dict[str, Any]:
        """Return where the training loop stands; see `AsyncDataIterator.state_dict`."""
        return self.iterator.state_dict(batch_finished=batch_finished)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on where an earlier run was; see `AsyncDataIterator.load_state_dict`."""
        self.iterator.load_state_dict(state)

    def _iter_batches(
        self,
        *,
        _collate_fn: Callable[[Any], Any] | None = None,
        **arguments: Any,
    ) -> Iterable[Any]:
        """Return an iterable of batches, each iteration an epoch.

        The base class makes everything else of it: batches of JAX and TensorFlow, ``to_tf`` and
        so on. Only its ``iter_torch_batches`` has a ``_finalize_fn``, too.
        """
        if _collate_fn is None:
            return _Epochs(partial(self.iterator.iter_batches, **arguments))
        recipe = Recipe(arguments.pop("batch_format"), _collate_fn)
        return _Epochs(partial(self.iterator._convert, recipe, **arguments))

    def _to_ref_bundle_iterator(self) -> Any:
        return self.materialize().iterator()._to_ref_bundle_iterator()

    def _ask(self, method: str, *args: object) -> Any:
        return answer_blocking(self.iterator.coordinator, method, *args)


class _Epochs:
    """An iterable of a new stream for each iteration, which is dropped with it."""

    def __init__(self, stream: Callable[[], BatchStream[Any]]) -> None:
        stream()  # wrong arguments are an error here already
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream())
