"""Errors on their way between processes: as they were raised, their tracebacks with them.

Ray wraps what remote code raises in classes of its own, and pickle drops causes and tracebacks. A
training loop is to see the error that its dataset's code raised, and where.
"""

import sys
import traceback
from collections.abc import Callable
from typing import Any, cast

from ray import cloudpickle
from ray.exceptions import RayTaskError, UserCodeException


class RemoteTraceback(Exception):
    """The text of a traceback from another process; the cause of an error that comes from there."""

    def __str__(self) -> str:
        """Start on a line of its own."""
        return f"\n{self.args[0]}"


def unwrap(error: BaseException) -> BaseException:
    """Return the exception the remote code raised, with the remote traceback as its cause.

    An error that is Ray's own, such as ``WorkerCrashedError``, comes back as it is, and what would
    steer the consumer's loop if it were raised there, such as StopIteration, as a RuntimeError.
    """
    text = None
    while isinstance(error, RayTaskError):
        text = str(error)
        error = cast("BaseException", error.cause)
    if text is None:
        return error
    error = _load(getattr(error, _ORIGINAL, None)) or error
    if isinstance(error, StopIteration | StopAsyncIteration) or not isinstance(error, Exception):
        error = RuntimeError(f"the dataset's code raised {error!r}")
    error.__cause__ = RemoteTraceback(text)
    return error


def pack_error(error: BaseException) -> bytes:
    """Serialize `error`, unwrapped, with its traceback, which pickle alone would drop."""
    error = unwrap(error)
    cause = error.__cause__
    if isinstance(cause, RemoteTraceback):
        text = cause.args[0]
    else:
        text = "".join(traceback.format_exception(error))
    described = traceback.format_exception_only(error)[-1].strip()
    packed: bytes = cloudpickle.dumps((_dump(error), described, text))
    return packed


def unpack_error(packed: bytes) -> BaseException:
    """Return the error given to `pack_error`, its traceback as the cause.

    One that could not be pickled, or cannot be unpickled here, comes back as a RuntimeError that
    names it.
    """
    dumped, described, text = cloudpickle.loads(packed)
    error = _load(dumped) or RuntimeError(described)
    error.__cause__ = RemoteTraceback(text)
    return error


_ORIGINAL = "asyncsplit_original"


def _by_value() -> tuple[Callable[[BaseException], Any], type]:
    # Local names are pickled by value: the workers that run the dataset need not have asyncsplit.

    def dump(error: BaseException) -> Any:
        try:
            made_by = error.__reduce__()[:2]
            return cloudpickle.dumps((type(error), made_by, error.args, vars(error)))
        except Exception:
            return None

    class KeepOriginal:
        """Stand-in for the flag ``DataContext.raise_original_map_exception``.

        Ray raises ``UserCodeException`` from what the user's function raised, and pickling drops
        that cause. With the flag True Ray raises the original instead, with two faults: a
        StopIteration out of ``map_batches`` ends the task as if it were done and loses its other
        rows, and a note on retries gets into the ``args``, with which some exceptions cannot be
        unpickled. So this object, asked for its truth while Ray handles the exception, raises
        Ray's wrapper with the original in it.
        """

        def __bool__(self) -> bool:
            original = sys.exception()
            if original is None:
                return False
            wrapper = UserCodeException("UDF failed to process a data block.")
            setattr(wrapper, _ORIGINAL, dump(original))
            raise wrapper from original

    return dump, KeepOriginal


_dump, KeepOriginal = _by_value()


def _load(dumped: bytes | None) -> BaseException | None:
    if dumped is None:
        return None
    try:
        cls, (make, made_of), args, state = cloudpickle.loads(dumped)
        try:
            error: BaseException = make(*made_of)
        except Exception:
            # What __init__ takes is not what it leaves in args, so that pickle cannot undo it.
            error = cls.__new__(cls)
        error.args = args
        vars(error).update(state)
    except Exception:
        return None
    return error
