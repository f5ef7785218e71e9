"""The ways to split that `docs/guarantees.md` tells apart."""

from typing import Any, Literal, NamedTuple

from ray.data import Dataset

import asyncsplit
from asyncsplit import AsyncDataIterator, SplitOptions


class Mode(NamedTuple):
    """How to split and read a dataset."""

    equal: bool = False
    routing: Literal["rows", "demand"] = "rows"
    in_order: bool = True
    shuffle: int | None = None
    """Size of the local shuffle's buffer."""

    def split(self, ds: Dataset, **options: Any) -> list[AsyncDataIterator]:
        """Split a dataset in two."""
        ds.context.execution_options.preserve_order = self.in_order
        return asyncsplit.streaming_split(
            ds, 2, equal=self.equal, options=SplitOptions(routing=self.routing, **options)
        )

    @property
    def reads(self) -> dict[str, Any]:
        """Return the arguments of ``iter_batches``, but for ``batch_size``."""
        return {"local_shuffle_buffer_size": self.shuffle} if self.shuffle else {}


MODES = {
    "equal, in order": Mode(equal=True),
    "in order": Mode(),
    "demand": Mode(routing="demand"),
    "any order": Mode(in_order=False),
    "local shuffle": Mode(shuffle=5),
}
