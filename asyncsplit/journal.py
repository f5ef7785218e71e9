"""Journal: a file in which a coordinator notes what the one restarted in its place has to know.

Ray restarts a coordinator on the node where it was. What the kernel was given is not lost when a
process is killed, and a few bytes take it some microseconds.
"""

import contextlib
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

_COMMITTED = struct.Struct("<?QQQ")
"""Whether a split is read; then rows, check and low of its position."""


class Journal:
    """The last epoch: who reads it, and how much of each split is committed.

    What changes with each commit is overwritten in place, by one write that a kill does not
    interrupt; for everything else the file is replaced. If that fails the job goes on without: a
    restarted coordinator then knows only what consumers tell it.
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
        records = (_pack(noted.positions.get(split)) for split in range(self._n))
        try:
            temporary = self._path.with_suffix(".tmp")
            temporary.write_bytes(header + b"".join(records))
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
            self._write(split, position)

    def leave(self, split: int) -> None:
        """Note that a split is not read any more."""
        self._noted.readers.pop(split, None)
        self._noted.positions.pop(split, None)
        self._write(split, None)

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

    def _write(self, split: int, position: Position | None) -> None:
        if self._file is None:
            return
        try:
            os.pwrite(self._file, _pack(position), self._header_bytes + split * _COMMITTED.size)
        except OSError as error:
            self._give_up(error)

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
