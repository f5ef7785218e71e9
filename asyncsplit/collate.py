"""What is made of batches before the loop gets them: at once if that is cheap, else by threads.

To a stream either is a pipeline. `Converted` applies a function where it is asked for a batch.
`Collated` applies one in a few threads of its own, ahead of the loop and in order.

Upstream: ``_format_in_threadpool`` in ``ray/data/_internal/block_batching/iter_batches.py``.
"""

import contextlib
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

from ray.data.collate_fn import ArrowBatchCollateFn, CollateFn, PandasBatchCollateFn

from asyncsplit.core.shuffle import ShuffleKey
from asyncsplit.pipeline import Pipeline

Convert = Callable[[Any], Any]
"""Makes what the loop gets of a batch."""

MAX_THREADS = 4
"""As upstream: more batches at a time than that would only contend for the interpreter."""

SKIPPED = object()
"""What a conversion returns if the loop is to get nothing for the batch."""

_END = object()


class Recipe(NamedTuple):
    """How to make what the loop gets: of batches in a format, by a function."""

    batch_format: str
    convert: Convert
    in_loop: bool = False
    """Whether it is done where the loop asks, because a thread would cost more, or must not."""
    pandas_as_arrow: bool = False
    """Whether batches from pandas blocks come as Arrow tables, whatever the format."""

    def pipeline(self, *, ahead: int, **arguments: Any) -> "Converted | Collated":
        """Return a pipeline without input; arguments as those of `Pipeline`."""
        pipeline = Pipeline(
            batch_format=self.batch_format, pandas_as_arrow=self.pandas_as_arrow, **arguments
        )
        if self.in_loop:
            return Converted(pipeline, self.convert)
        return Collated(pipeline, self.convert, ahead=ahead)


def input_format(collate_fn: Convert) -> str:
    """Return the format of the batches that a ``collate_fn`` takes.

    Raises:
        TypeError: If it is not a function, or not one that a thread can call.
    """
    if isinstance(collate_fn, type) and issubclass(collate_fn, CollateFn):
        raise TypeError(
            f"collate_fn={collate_fn.__name__} is a class: give an object of it,"
            f" {collate_fn.__name__}()"
        )
    if not callable(collate_fn):
        raise TypeError(
            f"collate_fn={collate_fn!r} must be a function of a batch, or an object of a subclass"
            " of ray.data.collate_fn.ArrowBatchCollateFn, NumpyBatchCollateFn or"
            " PandasBatchCollateFn"
        )
    called = getattr(collate_fn, "__call__", None)  # noqa: B004 - looked at, not called
    if any(map(inspect.iscoroutinefunction, (collate_fn, called))):
        raise TypeError(
            f"collate_fn={collate_fn!r} is a coroutine function, but runs in threads beside the"
            " loop: make it a plain function, or await in the loop what has to be awaited"
        )
    if isinstance(collate_fn, ArrowBatchCollateFn):
        return "pyarrow"
    return "pandas" if isinstance(collate_fn, PandasBatchCollateFn) else "numpy"


class _Stage:
    """A pipeline around another; what was handed out is counted here, and the rest there."""

    conversion: "Future[Any] | None" = None
    """What to wait for where ``next(batches)`` returned None; None if that is input."""

    def __init__(self, pipeline: Pipeline, convert: Convert) -> None:
        """Take over a pipeline that has no input yet."""
        self._pipeline = pipeline
        self._convert = convert
        self.takes_plain = pipeline.takes_plain
        self.rows_out = 0
        """Rows of all batches handed out."""
        self.batches_out = 0
        """Batches handed out."""

    def add(self, block: Any, start: int, stop: int, *, padding: bool = False) -> None:
        """Take rows of a block, as `Pipeline.add` does."""
        self._pipeline.add(block, start, stop, padding=padding)

    def finish(self) -> None:
        """Note that no more blocks come."""
        self._pipeline.finish()

    def resume(self, skipped: Sequence[int], delivered: int, seed: int | None = None) -> None:
        """Go on in the middle of a shuffle, as `Pipeline.resume` does."""
        self._pipeline.resume(skipped, delivered, seed)

    def close(self) -> None:
        """Let go of all data; there are no batches any more."""
        self._pipeline.close()

    @property
    def rows_in(self) -> int:
        """Rows of all blocks added."""
        return self._pipeline.rows_in

    @property
    def rows_dropped(self) -> int:
        """Rows of the last batch, if it was dropped for not being full."""
        return self._pipeline.rows_dropped

    @property
    def rows_buffered(self) -> int:
        """Rows added and neither handed out nor dropped."""
        return self.rows_in - self.rows_out - self.rows_dropped

    @property
    def padded_rows(self) -> int:
        """Rows handed out that repeat others."""
        return self._pipeline.padded_among(self.rows_out)

    @property
    def shuffle(self) -> ShuffleKey | None:
        """What the order is drawn from."""
        return self._pipeline.shuffle

    @property
    def oldest_unfinished(self) -> int | None:
        """Which call of `add` brought the oldest row that may be still to come, if shuffled."""
        return self._pipeline.oldest_unfinished

    def draw_from(self, advance: "Callable[[int], Future[Any] | None]") -> None:
        """Note how to get more input; see `Collated.draw_from`."""


class Converted(_Stage):
    """Apply a cheap function to each batch where it is asked for."""

    def __init__(self, pipeline: Pipeline, convert: Convert) -> None:
        """Take over a pipeline that has no input yet."""
        super().__init__(pipeline, convert)
        self.batches: Iterator[Any] = self._run()
        """The batches, and None wherever input is missing."""

    def _run(self) -> Iterator[Any]:
        for batch in self._pipeline.batches:
            if batch is None:
                yield None
                continue
            converted = [self._convert(batch)]
            del batch
            self.rows_out = self._pipeline.rows_out
            self.batches_out += 1
            yield converted.pop()


class _Task(NamedTuple):
    """A batch being converted."""

    future: "Future[Any]"
    rows_out: int
    """Rows handed out once this batch is."""
    oldest: int | None
    """What was the oldest unfinished before it."""


class Collated(_Stage):
    """Apply a function to each batch in threads, ``ahead`` batches ahead of the loop, in order.

    While the loop works on a batch, the next ones are made. They count as handed out when they
    are, never when they are ready. The error of a batch comes in its place, and ends the stream.
    Threads end with the batches, an error or `close`, as soon as a call they are in returns.
    """

    def __init__(self, pipeline: Pipeline, convert: Convert, *, ahead: int) -> None:
        """Take over a pipeline that has no input yet; no thread starts before it has a batch."""
        super().__init__(pipeline, convert)
        self.ahead = ahead
        """How many batches are made ahead."""
        self._tasks: deque[_Task] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._advance: Callable[[int], Future[Any] | None] | None = None
        self._input: Future[Any] | None = None
        self._oldest: int | None = None
        self._ended = False
        self._failed: Exception | None = None

    @property
    def batches(self) -> Iterator[Any]:
        """The batches, and None wherever input or a conversion has to be waited for."""
        return self

    def draw_from(self, advance: "Callable[[int], Future[Any] | None]") -> None:
        """Note how to get more input, so that batches can be begun while others are ready.

        ``advance`` is called with the rows that are finished with. It adds input if there is some,
        or returns what to wait for.
        """
        self._advance = advance

    def close(self) -> None:
        """Let go of all data and threads; there are no batches any more."""
        self._ended = True
        self._failed = self._advance = self._input = self.conversion = None
        self._tasks.clear()
        super().close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    @property
    def oldest_unfinished(self) -> int | None:
        """Which call of `add` brought the oldest row that may be still to come, if shuffled.

        Rows of batches that are ready, or in the loop's hands, are still to come.
        """
        oldest = self._pipeline.oldest_unfinished
        return oldest if self._oldest is None else self._oldest

    def __iter__(self) -> Self:
        """Return self."""
        return self

    def __next__(self) -> Any:
        """Return the next batch, or None if input or `conversion` has to be waited for."""
        self.conversion = None
        while True:
            self._fill()
            if not self._tasks:
                if not self._ended:
                    return None
                self._oldest = None
                failed = self._failed
                self.close()
                raise failed or StopIteration
            head = self._tasks[0].future
            if not head.done():
                self.conversion = head if self._input is None else _first_of(head, self._input)
                return None
            task = self._tasks.popleft()
            try:
                converted = task.future.result()
            except BaseException:
                self.close()
                raise
            self.rows_out, self._oldest = task.rows_out, task.oldest
            if converted is not SKIPPED:
                self.batches_out += 1
                return converted

    def _fill(self) -> None:
        """Begin as many batches as there is input for: the next one, and those ahead of it."""
        pipeline = self._pipeline
        while not self._ended and len(self._tasks) <= self.ahead:
            oldest = pipeline.oldest_unfinished
            try:
                batch = next(pipeline.batches, _END)
                if batch is None:
                    if self._is_out_of_input():
                        return
                    continue
            except Exception as error:
                # The batches before it come first.
                self._failed, batch = error, _END
            if batch is _END:
                self._ended = True
                return
            if self._threads is None:
                self._threads = ThreadPoolExecutor(
                    min(max(self.ahead, 1), MAX_THREADS), thread_name_prefix="asyncsplit-collate"
                )
                self._oldest = oldest
            future = self._threads.submit(_apply, self._convert, batch)
            del batch
            self._tasks.append(_Task(future, pipeline.rows_out, oldest))

    def _is_out_of_input(self) -> bool:
        """Get input if that is possible now."""
        if self._advance is None or (self._input is not None and not self._input.done()):
            return True
        if not self._tasks:
            # Nobody waits for the loop: let the stream do it, which checks more.
            self._input = None
            return True
        self._input = self._advance(self.rows_out)
        return self._input is not None


def _apply(convert: Convert, batch: Any) -> Any:
    try:
        return convert(batch)
    except (StopIteration, StopAsyncIteration) as error:
        # Raised in the loop it would pass for the end of the data.
        raise RuntimeError(f"collating a batch raised {error!r}") from error


def _first_of(one: "Future[Any]", other: "Future[Any]") -> "Future[Any]":
    """Return a future that is done as soon as one of two is."""
    first: Future[Any] = Future()

    def wake(_: object) -> None:
        with contextlib.suppress(InvalidStateError):
            first.set_result(None)

    one.add_done_callback(wake)
    other.add_done_callback(wake)
    return first
