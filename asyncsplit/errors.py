"""The error tree: everything asyncsplit raises on its own account."""

from collections.abc import Callable, Mapping


class AsyncSplitError(Exception):
    """Root of the errors asyncsplit raises on its own account."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """Pickle without calling ``__init__``: these cross actor boundaries."""
        return _restore, (type(self), self.args, self.__dict__)


class ExecutionActiveError(AsyncSplitError, RuntimeError):
    """The call needs a second executor while the dataset is being executed."""


class StaleEpochError(AsyncSplitError, ValueError):
    """The epoch asked for is over."""


class ConsumerConflictError(AsyncSplitError, ValueError):
    """Two live consumers want the same split; the newcomer gets this error."""


class ConsumerLostError(AsyncSplitError, TimeoutError):
    """A split's consumer did not come, so the others cannot go on."""


class CoordinatorLostError(AsyncSplitError):
    """The coordinator actor is gone and the epoch cannot be continued."""


class StateMismatchError(AsyncSplitError, ValueError):
    """A saved position does not belong to this dataset or this split."""


class StreamClosedError(AsyncSplitError):
    """The stream was closed and cannot deliver any more."""


def _restore(
    cls: type[AsyncSplitError], args: tuple[object, ...], state: Mapping[str, object]
) -> AsyncSplitError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error
