"""A few kills of a real job; ``make chaos`` does many."""

import pytest

from tests.chaos.kills import Chaos

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.parametrize(
    ("equal", "seed", "killed"),
    [pytest.param(True, 1, (1, 0, 0), marks=pytest.mark.deep), (False, 2, (2, 1, 1))],
)
async def test_no_row_is_lost_and_none_committed_comes_again(
    equal: bool, seed: int, killed: tuple[int, int, int]
) -> None:
    report = await Chaos(n=2, equal=equal, seed=seed, kills=sum(killed)).run()
    assert killed == (report.consumers_killed, report.coordinators_killed, report.workers_killed)
    assert report.taken_over, "somebody was replaced in the middle of an epoch"
