"""A short soak; ``make soak`` runs a thousand epochs and watches memory as well."""

import pytest

from tests.soak.measure import growth
from tests.soak.soak import Soak

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.deep
async def test_nothing_is_lost_and_nothing_that_is_counted_grows() -> None:
    soak = Soak(epochs=30, seed=157)
    await soak.run()
    assert soak.kills, "somebody was replaced in the middle of an epoch"
    assert soak.whole > 15
    assert not [it for it in growth(soak.samples, memory=False) if it.excessive]
