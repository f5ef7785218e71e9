"""AsyncDataIterator: what a worker holds of a split."""

import asyncio
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import ray
from ray import cloudpickle
from ray.data import DataContext, Schema
from ray.data.dataset import MaterializedDataset

from asyncsplit.batches import Batches
from asyncsplit.consumer import Consumer
from asyncsplit.core.replay import NOT_REPEATABLE
from asyncsplit.core.state import position_from, state_of
from asyncsplit.errors import StateMismatchError
from asyncsplit.guard import DuringExecution
from asyncsplit.remote import Coordinator, answer, settled
from asyncsplit.sync import SyncDataIterator
from asyncsplit.telemetry.stream_spans import schema_span
from asyncsplit.telemetry.tracing import Tracing
from asyncsplit.wire import Status


class AsyncDataIterator(Batches):
    """One split of a dataset: iterate it once per epoch, from one place at a time.

    It holds a handle to the split's coordinator and some integers, never the dataset: it can be
    sent to any Ray task or actor at a cost that does not depend on the dataset. Each copy made by
    sending is a consumer of its own, and a split has one consumer at a time, or each of its
    replicas has.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        split_index: int,
        world_size: int,
        serialized_bytes: int = 0,
        keep: object = None,
        tracing: Tracing | None = None,
        *,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        """Use `asyncsplit.streaming_split` instead."""
        self._consumer = Consumer(
            coordinator, split_index, serialized_bytes, keep, tracing, replica, replicas
        )
        self._world_size = world_size

    def __reduce__(self) -> tuple[Callable[[bytes], "AsyncDataIterator"], tuple[bytes]]:
        """Pickle into one byte string, so that its size is known where it is made.

        A state that was loaded goes along; what was read does not: a copy is another consumer.
        """
        consumer = self._consumer
        consumer.was_sent = True
        consumer.give_up_early()
        parts = (
            *(consumer.coordinator, consumer.split, self._world_size),
            *(consumer.tracing, consumer.replica, consumer.replicas),
            None if consumer.streams else consumer.position,
        )
        return _restore, (cloudpickle.dumps(parts),)

    def __repr__(self) -> str:
        """Show which split this is."""
        replica = f" replica={self.replica_index}" if self._consumer.replicas > 1 else ""
        return f"<AsyncDataIterator split={self.split_index} of {self._world_size}{replica}>"

    @property
    def split_index(self) -> int:
        """Which split this is, from 0."""
        return self._consumer.split

    @property
    def replica_index(self) -> int:
        """Which of the split's replicas this is, from 0."""
        return self._consumer.replica

    @property
    def coordinator(self) -> Coordinator:
        """The split's coordinator actor."""
        return self._consumer.coordinator

    def world_size(self) -> int:
        """Return how many splits there are."""
        return self._world_size

    async def materialize(self) -> MaterializedDataset[Any]:
        """Iterate one epoch and return this split's rows as a dataset.

        As in any epoch, all splits have to take part. The blocks are copied into the object store,
        where they are twice for a moment. This process owns the copies, so the dataset outlives
        the split, but not this process. If cancelled, the split is released and nothing is kept.
        """
        async with self.iter_batches(batch_size=None, batch_format=None) as stream:
            blocks = [block async for block in stream]
        return cast(
            "MaterializedDataset[Any]", await asyncio.to_thread(ray.data.from_blocks, blocks)
        )

    def state_dict(self, *, batch_finished: bool = False) -> dict[str, Any]:
        """Return where the training loop stands: a few integers, JSON-serialisable, at once.

        The batch in hand is not counted: it is finished when the next one is asked for. Call it in
        the process that iterates: it says where this object stands, and copies made by sending
        are consumers of their own.

        It warns if the state could not be loaded: in the middle of an epoch, of a dataset that does
        not preserve order or is routed on demand.

        Args:
            batch_finished: The batch in hand is finished now: the step with it is done, and
                what is saved along with the state has it in.
        """
        if self._consumer.was_sent and not self._consumer.streams:
            warnings.warn(
                f"split {self.split_index} was sent elsewhere and is not iterated here: this state"
                " says nothing of what the copies read. Call state_dict() where they iterate",
                RuntimeWarning,
                stacklevel=2,
            )
        where = self._consumer.where(batch_finished=batch_finished)
        if where.rows and not self._consumer.repeatable:
            warnings.warn(
                f"this state of split {self.split_index} cannot be loaded: epoch {where.epoch}"
                f" {NOT_REPEATABLE}. Or save states between two epochs",
                RuntimeWarning,
                stacklevel=2,
            )
        return state_of(where, self.split_index, self._world_size)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on where an earlier run's `state_dict` was taken.

        Each split loads its own state, or the list of all splits' states, before it is iterated;
        so does each replica of it. Of replicas that list has one or all, saved at the same step.
        It may come from a run with another number of splits: the new ones share what is
        left of the epoch. The dataset must be the same and preserve order; blocks that are
        finished with are not fetched.

        With a local shuffle in the middle of an epoch, the number of splits and the sizes of
        buffer and batch must be the same. The rest of the epoch is then drawn with the seed it
        began with.

        Raises:
            StateMismatchError: If the state is not one of this split, is damaged, or comes too
                late. That the dataset or the shuffle is another one shows when the epoch starts.
        """
        if self._consumer.streams:
            raise StateMismatchError(
                f"split {self.split_index} has been iterated already: load the state before"
            )
        if self._consumer.was_sent:
            warnings.warn(
                f"split {self.split_index} was sent elsewhere before this state was loaded: the"
                " copies do not have it. Load it first, or where they iterate",
                RuntimeWarning,
                stacklevel=2,
            )
        self._consumer.position = position_from(state, self.split_index, self._world_size)

    def as_data_iterator(self) -> SyncDataIterator:
        """Return a `ray.data.DataIterator` on this split, for code that wants one and blocks.

        It is the same consumer: iterate one of the two at a time.
        """
        return SyncDataIterator(self)

    async def schema(self, *, during_execution: DuringExecution = "raise") -> Schema | None:
        """Return the dataset's schema, computed once by the coordinator.

        Args:
            during_execution: What to do if it is not known yet and the dataset is being
                executed, so that computing it could deadlock: ``"raise"``; take the
                ``"observed"`` schema of the first block delivered; or ``"wait"`` for the epoch
                to end.

        Raises:
            ExecutionActiveError: With ``"raise"``, in that case.
        """
        if during_execution not in ("raise", "observed", "wait"):
            raise ValueError(
                f"during_execution={during_execution!r} is unknown:"
                " use 'raise', 'observed' or 'wait'"
            )
        tracer = None
        if (opened := self._consumer.tracer()) is not None:
            await settled(opened)
            tracer = opened.result()
        async with schema_span(tracer, during_execution) as trace:
            schema: Schema | None = await self._ask("get_dataset_schema", during_execution, trace)
        return schema

    async def get_context(self) -> DataContext:
        """Return a copy of the dataset's own `DataContext`."""
        context: DataContext = await self._ask("get_dataset_context")
        return context

    async def dataset_tag(self) -> dict[str, str]:
        """Return ``dataset`` (its id) and ``split_index``, which name this split in metrics."""
        tag: dict[str, str] = await self._ask("get_dataset_tag", self.split_index)
        return tag

    async def stats(self) -> str:
        """Return Ray Data's statistics of the last execution, and the split's own."""
        return str(await self._ask("stats"))

    async def status(self) -> Status:
        """Return what the coordinator is doing: epoch, who is missing, who is reading."""
        return Status(*await self._ask("status"))

    async def metrics_url(self) -> str | None:
        """Return where the coordinator serves Prometheus metrics; None if it does not."""
        url: str | None = await self._ask("metrics_url")
        return url

    async def shutdown(self) -> None:
        """Stop the dataset's execution for all splits; streams still open get an error."""
        self._consumer.give_up_early()
        await self._ask("shutdown_executor")

    async def _ask(self, method: str, *args: object) -> Any:
        return await answer(self._consumer.coordinator, method, *args)


def _restore(packed: bytes) -> AsyncDataIterator:
    coordinator, split, n, tracing, replica, replicas, loaded = cloudpickle.loads(packed)
    iterator = AsyncDataIterator(
        coordinator, split, n, len(packed), tracing=tracing, replica=replica, replicas=replicas
    )
    iterator._consumer.position = loaded
    return iterator
