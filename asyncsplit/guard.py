"""Schema cache and executor guard, under one `asyncio.Lock`.

A second executor on the same cluster can wait for the CPUs the first one holds and so deadlock
with it (Ray PR #61607). Hence one lock around everything that starts an executor: an epoch's
start and the small execution that `Dataset.schema` may need.
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Any, Literal, TypeVar

from ray.data import Dataset, Schema
from ray.exceptions import ObjectLostError

from asyncsplit import engine
from asyncsplit.errors import CoordinatorLostError, ExecutionActiveError
from asyncsplit.remote_errors import unwrap
from asyncsplit.telemetry.state import CoordinatorState

_R = TypeVar("_R")

DuringExecution = Literal["raise", "observed", "wait"]

FINISH_AFTER_S = 0.02
"""How long an exhausted executor is left as it is: to shut it down takes the interpreter for 2 to
3 ms, just when the last blocks are to be sent."""

Settle = Callable[[], None]
"""Blocks until somebody uses an execution no more that is shut down."""


class Guard:
    """Owns the dataset's only executor and the schema computed once."""

    def __init__(self, dataset: Dataset, thread: Executor, state: CoordinatorState) -> None:
        """Guard a dataset; blocking calls go to ``thread``, one at a time."""
        self._dataset = dataset
        # The engine changes the context it executes with; what a schema shows is the user's own.
        self._context = dataset.context.copy()
        self._state = state
        self._thread = thread
        self._lock = asyncio.Lock()
        self._schema: Schema | None = None
        self._execution: engine.Execution | None = None
        self._stats: str | None = None
        self._observed: asyncio.Future[Any] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> bool:
        """Whether the dataset is being executed."""
        return not self._idle.is_set()

    async def schema(
        self,
        during_execution: DuringExecution,
        make_way: Callable[[], Settle | None],
        begun: Callable[[], bool],
    ) -> Schema | None:
        """Return the dataset's schema, computing it at most once.

        While the dataset is being executed and the schema is not cached: ``"raise"`` raises,
        ``"observed"`` returns the schema of the epoch's first block as soon as there is one,
        ``"wait"`` waits for the execution to end. ``make_way`` is asked before: it gives up an
        execution that nobody needs yet, and returns None if there is no such one. Where no loop
        of the epoch has ``begun``, it is as with ``"observed"``: the end might wait for the caller.

        Raises:
            ExecutionActiveError: With ``"raise"``, if the dataset is being executed.
        """
        while True:
            async with self._held():
                if self._schema is not None:
                    self._state.schema_requests["hit"] += 1
                    return self._schema
                if await self._cleared(make_way):
                    self._state.schema_requests["miss"] += 1
                    self._schema = await self._blocking(engine.dataset_schema, self._dataset)
                    return self._schema
                observed = self._observed
            if during_execution == "raise" and begun():
                self._state.schema_requests["rejected"] += 1
                self._state.guard_rejections["schema"] += 1
                raise ExecutionActiveError(
                    "Cannot call schema() during active dataset execution: a second executor can"
                    " deadlock with the first. Call it before or after iterating, or use"
                    ' schema(during_execution="observed") for the schema of the blocks being'
                    ' delivered, or schema(during_execution="wait") to wait for the epoch to end.'
                )
            if (during_execution == "wait" and begun()) or observed is None:
                await self._idle.wait()
                continue
            found = await asyncio.shield(observed)
            if found is not None:
                self._state.schema_requests["observed"] += 1
                return engine.observed_schema(found, self._context)
            await self._idle.wait()

    async def start(
        self, epoch: int, settle: Settle | None, wanted: Callable[[], bool]
    ) -> engine.Execution | None:
        """Start the dataset's executor for an epoch; whatever keeps it from starting is raised.

        One that still runs is shut down first; ``settle`` is as for `stop`. Nothing starts, and
        None is returned, unless it is ``wanted`` still when it is its turn.
        """
        async with self._held():
            if not wanted():
                return None
            await self._shut_down(settle)
            self._idle.clear()
            self._state.executor = "starting"
            self._observed = asyncio.get_running_loop().create_future()
            try:
                self._execution = await self._blocking(engine.begin_epoch, self._dataset, epoch)
            except BaseException:
                self._ended()
                raise
            self._state.executor = "running"
            return self._execution

    def observe(self, schema: object) -> None:
        """Note the schema of a block of the running epoch; the first one counts."""
        if schema is not None:
            self._resolve(schema)

    def report_consumers(self, held_bytes: int, *, wanting: bool) -> None:
        """Tell the executor's backpressure how much consumers hold, and whether they want more."""
        if self._execution is not None:
            self._execution.report_consumers(held_bytes, wanting=wanting)

    def excuse_pause(self) -> None:
        """Tell the executor that it is the consumers who pause."""
        if self._execution is not None:
            self._execution.excuse_pause()

    def exhausted(self) -> None:
        """Note that the executor has delivered everything; it is shut down a little later."""
        self._ended()
        asyncio.get_running_loop().call_later(FINISH_AFTER_S, self._finish, self._execution)

    def failure(self, error: BaseException) -> BaseException:
        """Return what consumers are told of an error that an execution ended with."""
        error = unwrap(error)
        if not isinstance(error, ObjectLostError) or not engine.was_restarted():
            return error
        lost = CoordinatorLostError(
            "the coordinator was restarted, and blocks of the dataset are gone. Those that it holds"
            " itself (from_items, from_pandas, materialize) are kept by the process that created"
            " the split while it holds one of the iterators: keep one there, and create a new split"
        )
        lost.__cause__ = error
        return lost

    async def stop(self, *settle: Settle | None) -> None:
        """Shut the running executor down, if there is one, and let go of its blocks.

        Each of ``settle`` blocks until somebody else uses the execution no more.
        """
        async with self._held():
            await self._shut_down(*settle)

    def close(self) -> None:
        """Shut the running executor down at once, from any thread, for good."""
        if self._execution is not None:
            self._execution.shutdown()

    async def stats(self) -> str:
        """Return Ray Data's own statistics of the running or the last execution."""
        if self._execution is not None:
            return await self._blocking(self._execution.stats)
        return self._stats or str(await self._blocking(self._dataset.stats))

    async def _cleared(self, make_way: Callable[[], Settle | None]) -> bool:
        """Shut down what is through, or makes way; tell whether nothing is executed now."""
        settle = None
        if self.active and (settle := make_way()) is None:
            return False
        await self._shut_down(settle)
        return True

    def _finish(self, execution: engine.Execution | None) -> None:
        if execution is not None and execution is self._execution:
            asyncio.get_running_loop().run_in_executor(self._thread, execution.finish)

    async def _shut_down(self, *settle: Settle | None) -> None:
        if self._execution is not None:
            self._state.executor = "stopping"
            await self._blocking(
                self._execution.shutdown if self.active else self._execution.finish
            )
        if self._execution is not None and self.active:
            # One that is stopped early keeps blocks nobody took, and is full of cycles.
            self._stats = await self._blocking(self._execution.stats)
            self._execution = None
            for each in filter(None, settle):
                await self._blocking(each)
            await self._blocking(gc.collect)
        self._ended()

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        async with self._lock:
            self._state.guard_locks += 1
            self._state.guard_locked_at = began = time.monotonic()
            try:
                yield
            finally:
                self._state.guard_lock_s += time.monotonic() - began
                self._state.guard_locked_at = None

    def _ended(self) -> None:
        self._state.executor = "idle"
        self._resolve(None)
        self._idle.set()

    def _resolve(self, schema: object | None) -> None:
        if self._observed is not None and not self._observed.done():
            self._observed.set_result(schema)

    async def _blocking(self, call: Callable[..., _R], *args: object) -> _R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)
