"""Arguments of `AsyncDataConfig`, and the files in which ranks save where they stand."""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import ray.train
from ray import cloudpickle
from ray.data import ExecutionOptions

from asyncsplit import AsyncDataIterator, SplitOptions, StateMismatchError
from asyncsplit.core.position import Position
from asyncsplit.train import AsyncDataConfig, load_state, save_state


class Rank(NamedTuple):
    rank: int

    def get_world_rank(self) -> int:
        return self.rank


def iterator(
    split: int, n: int, position: Position | None = None, *, replica: int = 0, replicas: int = 1
) -> AsyncDataIterator:
    it = AsyncDataIterator(cast("Any", None), split, n, replica=replica, replicas=replicas)
    it._consumer.position = position
    return it


def save(directory: Path, its: list[AsyncDataIterator], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, it in enumerate(its):
        monkeypatch.setattr(ray.train, "get_context", lambda rank=rank: Rank(rank))
        save_state(directory, it)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"datasets_to_split": ["a", 1]}, TypeError, "datasets_to_split has 1"),
        ({"datasets_to_split": "train"}, TypeError, "train"),
        ({"execution_options": 3}, TypeError, "execution_options has 3"),
        ({"options": {"train": 3}}, TypeError, "options has 3"),
        ({"equal": 3}, TypeError, "equal has 3"),
        ({"equal": {"val": "even"}}, ValueError, "equal='even'"),
        ({"options": SplitOptions(routing="demand")}, ValueError, "routing='demand'"),
        ({"options": {"train": SplitOptions(routing="demand")}}, ValueError, "routing='demand'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_worker_starts(
    arguments: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        AsyncDataConfig(**arguments)


def test_a_config_travels() -> None:
    """Ray Train copies it, and sends it to the actor that configures datasets."""
    config = AsyncDataConfig(
        ["train"],
        {"train": ExecutionOptions(preserve_order=True)},
        sync=True,
        equal={"train": False, "val": "pad"},
        options={"train": SplitOptions(routing="demand")},
    )
    copy = cloudpickle.loads(cloudpickle.dumps(deepcopy(config)))
    own = ("_datasets_to_split", "_sync", "_equal", "_options")
    assert [vars(copy)[name] for name in own] == [vars(config)[name] for name in own]


def test_ranks_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = [Position(2, 30, 7), Position(3)]
    save(tmp_path, [iterator(i, 2, positions[i]) for i in range(2)], monkeypatch)
    for split, position in enumerate(positions):
        it = iterator(split, 2)
        assert load_state(tmp_path, it) == position.epoch
        assert it.state_dict()["rows"] == position.rows


def test_ranks_that_share_a_split_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    its = [
        iterator(split, 2, Position(2, 30, 7), replica=replica, replicas=2)
        for split in range(2)
        for replica in range(2)
    ]
    save(tmp_path, its, monkeypatch)
    for split, replica in ((0, 0), (0, 1), (1, 0), (1, 1)):
        it = iterator(split, 2, replica=replica, replicas=2)
        assert load_state(tmp_path, it) == 2
        assert it.state_dict()["rows"] == 30
    save(tmp_path, [*its[:3], iterator(1, 2, Position(2, 40, 7), replica=1)], monkeypatch)
    with pytest.raises(StateMismatchError, match="of all replicas, saved at the same step"):
        load_state(tmp_path, iterator(0, 2))


def test_more_ranks_share_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, [iterator(i, 2, Position(2, 30, 7)) for i in range(2)], monkeypatch)
    it = iterator(2, 3)
    assert load_state(tmp_path, it) == 2
    assert it.state_dict()["earlier"] == [[[30, 7], [30, 7]]]


def test_of_a_whole_dataset_a_new_rank_goes_on_where_rank_0_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, [iterator(0, 1, Position(rank + 4)) for rank in range(2)], monkeypatch)
    for rank, epoch in ((0, 4), (1, 5), (2, 4)):
        monkeypatch.setattr(ray.train, "get_context", lambda rank=rank: Rank(rank))
        assert load_state(tmp_path, iterator(0, 1)) == epoch


def test_a_checkpoint_without_the_states_of_all_ranks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StateMismatchError, match="save_state on every rank"):
        load_state(tmp_path, iterator(0, 2))
    save(tmp_path, [iterator(0, 2, Position(2))], monkeypatch)
    with pytest.raises(StateMismatchError, match="one state of each"):
        load_state(tmp_path, iterator(0, 2))
    with pytest.raises(StateMismatchError, match="'val'"):
        load_state(tmp_path, iterator(0, 2), "val")
