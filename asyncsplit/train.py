"""Ray Train: hand out splits as dataset shards, and save in a checkpoint where all ranks stand.

Needs ``ray[train]``. Ray Train is not imported by anything else here.
"""

import json
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast

import ray.train
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from asyncsplit.api import check_equal, streaming_split
from asyncsplit.core.routing import Equal
from asyncsplit.errors import StateMismatchError
from asyncsplit.iterator import AsyncDataIterator
from asyncsplit.options import SplitOptions
from asyncsplit.sync import SyncDataIterator

T = TypeVar("T")

Shard = AsyncDataIterator | SyncDataIterator


class AsyncDataConfig(DataConfig):
    """Make `ray.train.get_dataset_shard` return asyncsplit's iterators.

    Pass it to a trainer as ``dataset_config``. Each dataset is split among the workers, or read as
    a whole by each of them. A worker gets an iterator, never the dataset. A coordinator ends, and
    with it what it executes, when no worker of its group is left.
    """

    def __init__(
        self,
        datasets_to_split: Any = "all",
        execution_options: ExecutionOptions | dict[str, ExecutionOptions] | None = None,
        enable_shard_locality: bool = True,
        *,
        sync: bool = False,
        equal: Equal | Mapping[str, Equal] = True,
        options: SplitOptions | Mapping[str, SplitOptions] | None = None,
    ) -> None:
        """Say how datasets are given to workers; the first three arguments are `DataConfig`'s.

        Args:
            datasets_to_split: Names of the datasets to split, or ``"all"``. Of the others each
                worker reads all rows, as it likes: it has a coordinator of its own for each.
            execution_options: Ray Data's options for all datasets, or by dataset. Resuming in the
                middle of an epoch needs ``preserve_order=True``.
            enable_shard_locality: Prefer blocks on a worker's own node.
            sync: Hand out `ray.data.DataIterator` objects, as ``as_data_iterator`` makes them.
            equal: Give all workers the same number of rows of a dataset that is split, as in
                `asyncsplit.streaming_split`; for all datasets, or by dataset: True where it is not
                named.
            options: What else `asyncsplit.streaming_split` takes; for all datasets, or by dataset.
                With ``replicas=r`` each ``r`` workers of successive ranks share a split.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument's value is not allowed.
        """
        super().__init__(datasets_to_split, execution_options, enable_shard_locality)
        if datasets_to_split != "all":
            _check_each("datasets_to_split", datasets_to_split, str)
        if execution_options is not None:
            _check_each("execution_options", _values(execution_options), ExecutionOptions)
        _check_each("equal", _values(equal), bool | str)
        if options is not None:
            _check_each("options", _values(options), SplitOptions)
        self._sync = bool(sync)
        self._equal = dict(equal) if isinstance(equal, Mapping) else equal
        self._options = dict(options) if isinstance(options, Mapping) else options
        by_name: set[str | None] = {None}
        for setting in (self._equal, self._options):
            by_name.update(setting if isinstance(setting, dict) else ())
        for name in by_name:
            check_equal(_of(self._equal, name, True), _of(self._options, name, SplitOptions()))

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        """Create the coordinators and return each worker's iterators by dataset, and wait for none.

        Names, copies and execution options are seen to by `DataConfig`, whose ``configure`` calls
        what splits a dataset.
        """
        divided = {name: _Divided(self, name, ds) for name, ds in datasets.items()}
        return super().configure(
            cast("dict[str, Dataset]", divided),
            world_size,
            worker_handles,
            worker_node_ids,
            **kwargs,
        )

    def split(
        self, name: str, ds: Dataset, workers: int, *, locality_hints: list[str] | None = None
    ) -> list[Shard]:
        """Split a dataset among workers, as is said for the one of this name."""
        options = _of(self._options, name, SplitOptions())
        n, left = divmod(workers, options.replicas)
        if left:
            raise ValueError(
                f"dataset {name!r} cannot be split among {workers} workers with"
                f" SplitOptions.replicas={options.replicas}: use a multiple of that as num_workers,"
                " or other replicas"
            )
        return self._shards(name, ds, n, locality_hints and locality_hints[:: options.replicas])

    def whole(self, name: str, ds: Dataset) -> Shard:
        """Return an iterator over all of a dataset, for one worker alone."""
        (shard,) = self._shards(name, ds, 1, None, replicas=1)
        return shard

    def _shards(
        self, name: str, ds: Dataset, n: int, hints: list[str] | None, **changes: Any
    ) -> list[Shard]:
        its = [
            _Sent(it)
            for it in streaming_split(
                ds,
                n,
                equal=n > 1 and _of(self._equal, name, True),
                locality_hints=hints,
                options=replace(_of(self._options, name, SplitOptions()), **changes),
            )
        ]
        return [it.as_data_iterator() for it in its] if self._sync else list(its)


class _Sent(AsyncDataIterator):
    """An iterator that lets go of its coordinator when it is sent to its worker.

    Ray Train keeps what it has sent, until the next group has started, or for good. A coordinator
    lives as long as somebody has a handle to it: so it ends with the workers.
    """

    def __init__(self, iterator: AsyncDataIterator) -> None:
        """Become the same consumer."""
        self._consumer = iterator._consumer
        self._world_size = iterator.world_size()

    def __reduce__(self) -> Any:
        if "_consumer" not in vars(self):
            raise RuntimeError(
                "this shard has been sent to its worker: call ray.train.get_dataset_shard() once"
                " in each worker"
            )
        reduced = super().__reduce__()
        del self._consumer
        return reduced


class _Divided:
    """A dataset as `DataConfig.configure` takes it, but for what comes of dividing it."""

    def __init__(self, config: AsyncDataConfig, name: str, ds: Dataset) -> None:
        self._config = config
        self._name = name
        self._dataset = ds

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._dataset, attribute)

    def copy(self, other: "_Divided") -> "_Divided":
        """Copy another one: a static method, to `DataConfig`."""
        dataset = other._dataset
        return _Divided(other._config, other._name, dataset.copy(dataset))

    def streaming_split(
        self, n: int, *, equal: bool, locality_hints: list[str] | None
    ) -> list[Shard]:
        """Split it among workers."""
        return self._config.split(self._name, self._dataset, n, locality_hints=locality_hints)

    def iterator(self) -> Shard:
        """Return an iterator over all of it."""
        return self._config.whole(self._name, self._dataset)


def get_dataset_shard(
    dataset_name: str = "train", config: AsyncDataConfig | None = None
) -> AsyncDataIterator:
    """Return this worker's iterator, also where `ray.train.get_dataset_shard` has a whole dataset.

    So a training function is the same with ``num_workers=0``, where Ray Train runs it in the
    driver's process and passes datasets on as they are.

    Args:
        dataset_name: The dataset's name in the trainer's ``datasets``.
        config: What makes an iterator of such a dataset; the trainer's own is not known there.

    Raises:
        KeyError: If there is no dataset of that name.
        TypeError: If the trainer's ``dataset_config`` is no `AsyncDataConfig`.
    """
    shard: object = ray.train.get_dataset_shard(dataset_name)
    if isinstance(shard, AsyncDataIterator | SyncDataIterator):
        return _async(shard)
    if not isinstance(shard, Dataset):
        raise TypeError(
            f"the shard of dataset {dataset_name!r} is a {type(shard).__name__}: pass"
            " dataset_config=asyncsplit.train.AsyncDataConfig() to the trainer"
        )
    if shard not in _local_shards:
        (shards,) = (config or AsyncDataConfig()).configure({dataset_name: shard}, 1, None, None)
        _local_shards[shard] = _async(cast("Shard", shards[dataset_name]))
    return _local_shards[shard]


_local_shards: "weakref.WeakKeyDictionary[Dataset, AsyncDataIterator]" = weakref.WeakKeyDictionary()
"""Made by `get_dataset_shard`, which returns the same one each time as Ray Train does."""


def save_state(directory: str | Path, iterator: Shard, dataset_name: str = "train") -> None:
    """Write where this rank stands in the dataset into the directory of its checkpoint.

    Call it on every rank, and report the directory as a checkpoint on every rank: Ray Train makes
    one checkpoint of all. The batch in hand counts as trained on. It is a file of some 100 bytes.

    Args:
        directory: What is given to ``ray.train.Checkpoint.from_directory``.
        iterator: What `get_dataset_shard` returned, also while it is being iterated.
        dataset_name: Tells several datasets apart.
    """
    rank = ray.train.get_context().get_world_rank()
    path = Path(directory) / _FILE.format(name=dataset_name, rank=rank)
    path.write_text(json.dumps(iterator.state_dict(batch_finished=True)))


def load_state(directory: str | Path, iterator: Shard, dataset_name: str = "train") -> int:
    """Go on where the ranks stood that saved a checkpoint; return the epoch to go on in.

    Call it on every rank before the iterator is iterated. There may be more or fewer ranks than
    then: they share what is left of the epoch. Of a dataset that is not split, a rank goes on
    where it was, and a new one where rank 0 was.

    Args:
        directory: The checkpoint as a directory, as from ``checkpoint.as_directory()``.
        iterator: What `get_dataset_shard` returned.
        dataset_name: As in `save_state`.

    Raises:
        StateMismatchError: If there is no state of such a dataset, or not of all its ranks; for
            other reasons see `AsyncDataIterator.load_state_dict`.
    """
    pattern = _FILE.format(name=dataset_name, rank="*")
    ranks = {
        int(path.stem.rpartition("-")[2]): json.loads(path.read_text())
        for path in Path(directory).glob(pattern)
    }
    if not ranks:
        raise StateMismatchError(
            f"{directory} holds no state of dataset {dataset_name!r} ({pattern}): call"
            " asyncsplit.train.save_state on every rank before ray.train.report"
        )
    if iterator.world_size() == 1 and all(state["world_size"] == 1 for state in ranks.values()):
        rank = ray.train.get_context().get_world_rank()
        iterator.load_state_dict(ranks.get(rank, ranks[min(ranks)]))
    else:
        iterator.load_state_dict(list(ranks.values()))
    return int(iterator.state_dict()["epoch"])


_FILE = "asyncsplit-{name}-{rank}.json"


def _async(shard: Shard) -> AsyncDataIterator:
    return shard.iterator if isinstance(shard, SyncDataIterator) else shard


def _of(setting: Any, name: str | None, default: T) -> T:
    """Return what is set for one dataset."""
    if isinstance(setting, dict):
        setting = setting.get(name)
    return default if setting is None else cast("T", setting)


def _values(setting: Any) -> list[Any]:
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]


def _check_each(argument: str, values: list[Any], kind: type | UnionType) -> None:
    for value in values:
        if not isinstance(value, kind):
            name = getattr(kind, "__name__", kind)
            raise TypeError(f"{argument} has {value!r} in it, which is no {name}")
