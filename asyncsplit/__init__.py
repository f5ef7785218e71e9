"""Feed async training loops from Ray Data: nothing lost, nothing doubled, nobody hangs."""

from asyncsplit.api import iter_batches as iter_batches
from asyncsplit.api import streaming_split as streaming_split
from asyncsplit.errors import AsyncSplitError as AsyncSplitError
from asyncsplit.errors import ConsumerConflictError as ConsumerConflictError
from asyncsplit.errors import ConsumerLostError as ConsumerLostError
from asyncsplit.errors import CoordinatorLostError as CoordinatorLostError
from asyncsplit.errors import ExecutionActiveError as ExecutionActiveError
from asyncsplit.errors import StaleEpochError as StaleEpochError
from asyncsplit.errors import StateMismatchError as StateMismatchError
from asyncsplit.errors import StreamClosedError as StreamClosedError
from asyncsplit.iterator import AsyncDataIterator as AsyncDataIterator
from asyncsplit.options import SplitOptions as SplitOptions
from asyncsplit.options import TelemetryConfig as TelemetryConfig
from asyncsplit.stream import BatchStream as BatchStream
from asyncsplit.stream import StreamStatistics as StreamStatistics

__version__ = "0.1.0"
