"""Readers: what consumes a split, numbered through all splits.

With one replica the number of a reader is that of its split. With ``r`` of them, reader ``i`` is
replica ``i % r`` of split ``i // r``: as ranks are numbered where those that share data are
neighbours. Where a number stands for one reader, as at the barrier, it is called ``split``.
"""

from collections.abc import Iterable


def readers_of(split: int, replicas: int) -> range:
    """Return the readers of a split."""
    return range(split * replicas, (split + 1) * replicas)


def reader_name(reader: int, replicas: int) -> str:
    """Name a reader in a message: its split, and which replica if there are several."""
    split, replica = divmod(reader, replicas)
    return f"split {split}" if replicas == 1 else f"replica {replica} of split {split}"


def reader_names(readers: Iterable[int], replicas: int) -> str:
    """Name several readers in a message."""
    if replicas == 1:
        return f"splits {sorted(readers)}"
    return ", ".join(reader_name(reader, replicas) for reader in sorted(readers))
