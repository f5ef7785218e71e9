"""An actor's constructor argument, in a form that Ray keeps with the actor.

An argument above 100 KB goes into the object store and may be gone when the actor is to be
restarted; that the same can happen to objects an argument refers to, Ray says in an error line
(Ray issue #53727). What is cut into small pieces stays with the actor's description, up to 10 MB
(``task_rpc_inlined_bytes_limit``).
"""

import io
import pickle
from collections.abc import Iterable
from typing import Any, NamedTuple

from ray import ObjectRef, cloudpickle

from asyncsplit import engine

PIECE_BYTES = 64 * 1024


class Parcel(NamedTuple):
    """A pickled value."""

    pieces: list[bytes]
    """Each to be an argument of its own."""
    refs: "list[ObjectRef[Any]]"
    """What the value refers to, which the pieces do not keep."""


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)  # type: ignore[no-untyped-call]
        self.refs: list[ObjectRef[Any]] = []

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, ObjectRef):
            self.refs.append(value)
            return engine.reduce_untracked(value)
        return super().reducer_override(value)  # type: ignore[no-untyped-call]


def pack(value: object) -> Parcel:
    """Pickle a value."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)  # type: ignore[no-untyped-call]
    packed = file.getvalue()
    pieces = [packed[i : i + PIECE_BYTES] for i in range(0, len(packed), PIECE_BYTES)]
    return Parcel(pieces, pickler.refs)


def unpack(pieces: Iterable[bytes]) -> Any:
    """Return the value that was packed."""
    return pickle.loads(b"".join(pieces))
