"""What a dataset's own code raises reaches every consumer as it is."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data import ActorPoolStrategy
from ray.exceptions import WorkerCrashedError

import asyncsplit
from asyncsplit import CoordinatorLostError
from tests.integration.consume import Drive, read, read_epoch

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


class OurError(ValueError):
    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


async def test_an_error_in_a_users_function_reaches_all() -> None:
    def fail(batch: Any) -> Any:
        raise OurError("bad row", 7)

    its = asyncsplit.streaming_split(ray.data.range(100).map_batches(fail), 3)
    drives: tuple[Drive, ...] = ("async", "sync")
    errors = [
        error
        for drive in drives
        for error in await asyncio.gather(*(read(it, drive) for it in its), return_exceptions=True)
    ]
    assert len(errors) == 6
    for error in errors:
        assert type(error).__name__ == "OurError"
        assert isinstance(error, ValueError)
        assert error.args == ("bad row",)
        assert error.code == 7  # type: ignore[attr-defined]
        assert "in fail" in str(error.__cause__)


async def test_the_next_epoch_works_once_the_cause_is_gone(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()

    def fail(batch: Any) -> Any:
        if broken.exists():
            raise OSError("the disk is full")
        return batch

    its = asyncsplit.streaming_split(ray.data.range(100).map_batches(fail), 2)
    for _ in range(2):
        errors = await asyncio.gather(*(read(it) for it in its), return_exceptions=True)
        assert [type(error) for error in errors] == [OSError, OSError]
    broken.unlink()
    assert sum(len(ids) for ids in await read_epoch(its)) == 100


async def test_an_error_in_the_middle_comes_after_what_was_delivered(tmp_path: Path) -> None:
    def fail_late(batch: Any) -> Any:
        if 90 in batch["id"]:
            while not (tmp_path / "go").exists():
                time.sleep(0.01)
            raise OurError("late", 1)
        return batch

    ds = ray.data.range(100, override_num_blocks=10).map_batches(fail_late)
    (it,) = asyncsplit.streaming_split(ds, 1)
    seen: list[int] = []

    async def loop() -> None:
        async for batch in it.iter_batches(batch_size=10):
            seen.extend(batch["id"].tolist())
            await asyncio.to_thread((tmp_path / "go").touch)

    with pytest.raises(ValueError, match="late"):
        await loop()
    assert 0 < len(set(seen)) == len(seen)


async def test_an_actor_pool_that_does_not_come_up_fails_the_epoch_for_all(
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken"
    broken.touch()

    class Model:
        def __init__(self) -> None:
            if broken.exists():
                raise RuntimeError("no weights")

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch

    ds = ray.data.range(100, override_num_blocks=2).map_batches(
        Model, compute=ActorPoolStrategy(size=1)
    )
    its = asyncsplit.streaming_split(ds, 2)
    errors = await asyncio.gather(*(read(it) for it in its), return_exceptions=True)
    for error in errors:
        assert isinstance(error, Exception)
        assert "no weights" in f"{error} {error.__cause__}"
    assert str(errors[0]) == str(errors[1])
    broken.unlink()
    assert sum(len(ids) for ids in await read_epoch(its)) == 100


# Ray 2.60 has no other way yet to limit the retries of a map task.
@pytest.mark.filterwarnings("ignore:`ray_remote_args` is deprecated")
async def test_a_worker_that_kills_itself_fails_the_epoch_when_retries_are_spent() -> None:
    def die(batch: Any) -> Any:
        os._exit(1)

    ds = ray.data.range(10).map_batches(die, max_retries=0)
    (it,) = asyncsplit.streaming_split(ds, 1)
    with pytest.raises(WorkerCrashedError):
        await read(it)


class OnlyOnDrivers:
    """Cannot be unpickled by the coordinator."""

    def __reduce__(self) -> Any:
        return eval, ("1 / 0",)


async def test_a_dataset_that_cannot_be_unpickled_is_named_as_the_cause() -> None:
    value = OnlyOnDrivers()
    ds = ray.data.range(10).map_batches(lambda batch: batch | {"value": value})
    (it,) = asyncsplit.streaming_split(ds, 1)
    with pytest.raises(CoordinatorLostError, match="could not be started: ZeroDivisionError"):
        await read(it)
