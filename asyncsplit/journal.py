"""Journal: a file in which a coordinator notes what the one restarted in its place has to know.

Ray restarts a coordinator on the node where it was. What the kernel was given is not lost when a
process is killed, and a few bytes take it some microseconds.
"""

import contextlib
import errno
import json
import logging
import os
import struct
from pathlib import Path
from typing import Any

from asyncsplit.core.epochs import Noted, Stream
from asyncsplit.core.position import Past, Position
from asyncsplit.core.shuffle import ShuffleKey

logger = logging.getLogger(__name__)

ONE_WRITE_BYTES = 4096
"""What the kernel writes as a whole or not at all, also when the process is killed: a page."""

_COMMITTED = struct.Struct("<?QQQ")
"""Whether a split is read; then rows, check and low of its position."""


class Journal:
    """The last epoch: who reads it, and how much of each split is committed.

    What changes with each commit is overwritten in place, by one write that a kill does not
    interrupt. So is the whole of it when an epoch begins, if it is short enough for that; else the
    file is replaced, in six calls, after each of which other threads may keep the interpreter for
    5 ms. If it fails the job goes on without: a restarted coordinator then knows only what
    consumers tell it.
    """

    def __init__(self, path: Path, n: int) -> None:
        """Use the file at ``path``, which is there if another coordinator has been before."""
        self._path = path
        self._n = n
        self._file: int | None = None
        self._header_bytes = 0
        self._noted = Noted(-1, {}, {})

    def read(self) -> Noted | None:
        """Return what the coordinator before this one has noted; None if there was none."""
        try:
            header, _, committed = self._path.read_bytes().partition(b"\n")
            return _parse(json.loads(header), committed)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, struct.error) as error:
            self._give_up(error)
            return None

    def begin(self, noted: Noted) -> None:
        """Note an epoch: that it begins, or, without readers, that it is over."""
        self._noted = noted
        header = json.dumps(_header(noted)).encode() + b"\n"
        self._header_bytes = len(header)
        content = header + b"".join(_pack(noted.positions.get(split)) for split in range(self._n))
        if self._file is not None and len(content) <= ONE_WRITE_BYTES:
            self._write(content, 0)  # what may stand behind it is not read
            return
        try:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_bytes(content)
            temporary.replace(self._path)
            self.close()
            self._file = os.open(self._path, os.O_WRONLY)
        except OSError as error:
            self._give_up(error)

    def take_over(self, split: int, reader: Stream, position: Position) -> None:
        """Note that a split has another reader, who begins there."""
        epoch, readers, positions = self._noted
        self.begin(Noted(epoch, {**readers, split: reader}, {**positions, split: position}))

    def commit(self, split: int, position: Position) -> None:
        """Note how much of a split is committed."""
        if self._noted.positions.get(split) != position:
            self._noted.positions[split] = position
            self._commit(split, position)

    def leave(self, split: int) -> None:
        """Note that a split is not read any more."""
        self._noted.readers.pop(split, None)
        self._noted.positions.pop(split, None)
        self._commit(split, None)

    def remove(self) -> None:
        """Remove the file: no other coordinator comes."""
        self.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file, and leave it to the coordinator after this one."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _commit(self, split: int, position: Position | None) -> None:
        if self._file is not None:
            self._write(_pack(position), self._header_bytes + split * _COMMITTED.size)

    def _write(self, content: bytes, at: int) -> None:
        assert self._file is not None
        try:
            written = os.pwrite(self._file, content, at)
        except OSError as error:
            self._give_up(error)
        else:
            if written < len(content):
                self._give_up(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def _give_up(self, error: Exception) -> None:
        """Leave nothing behind that is not true any more."""
        logger.warning(
            "%s cannot be written or read (%s): if the coordinator dies together with consumers,"
            " their splits begin anew",
            self._path,
            error,
        )
        self.remove()


def _header(noted: Noted) -> dict[str, object]:
    """Return what does not change with a commit."""
    earlier = {position.earlier for position in noted.positions.values()}
    return {
        "epoch": noted.epoch,
        "readers": list(noted.readers.items()),
        "shuffles": [(split, each.shuffle) for split, each in noted.positions.items()],
        "earlier": earlier.pop() if earlier else (),
    }


def _pack(position: Position | None) -> bytes:
    if position is None:
        return _COMMITTED.pack(False, 0, 0, 0)
    return _COMMITTED.pack(True, position.rows, position.check, position.low)


def _parse(header: dict[str, Any], committed: bytes) -> Noted:
    epoch = header["epoch"]
    earlier = tuple(tuple(Past(*past) for past in splits) for splits in header["earlier"])
    shuffles = {split: key and ShuffleKey(*key) for split, key in header["shuffles"]}
    readers: dict[int, Stream] = {}
    positions: dict[int, Position] = {}
    for split, reader in header["readers"]:
        read, rows, check, low = _COMMITTED.unpack_from(committed, split * _COMMITTED.size)
        if read:
            readers[split] = Stream(*reader)
            positions[split] = Position(
                epoch, rows, check, shuffle=shuffles[split], low=low, earlier=earlier
            )
    return Noted(epoch, readers, positions)
