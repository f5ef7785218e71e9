"""A few kills of a real job; ``make chaos`` does many."""

import pytest

from tests.chaos.kills import Chaos

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.parametrize(("equal", "seed", "kills"), [(True, 1, 5), (False, 2, 3)])
async def test_no_row_is_lost_and_none_committed_comes_again(
    equal: bool, seed: int, kills: int
) -> None:
    report = await Chaos(n=2, equal=equal, seed=seed, kills=kills).run()
    assert (report.consumers_killed, report.workers_killed) == (kills - 1, 1)
    assert report.taken_over, "somebody was replaced in the middle of an epoch"
