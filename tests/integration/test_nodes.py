"""Several nodes: where blocks and coordinator are."""

from typing import Any

import pytest

from tests.integration.nodes import BLOCKS


@pytest.fixture(scope="module")
def places(play: Any) -> Any:
    """Return `tests.integration.nodes.Places`."""
    return play("blocks and nodes")


def test_hints_bring_blocks_to_where_they_were_made(places: Any) -> None:
    followed, swapped = places["followed"], places["swapped"]
    for blocks in followed, swapped:
        assert blocks["unknown"] == 0
        assert blocks["local"] + blocks["remote"] == 2 * BLOCKS
    assert followed["local"] > followed["remote"]
    assert swapped["local"] < swapped["remote"]


def test_the_coordinator_runs_where_it_is_put(places: Any) -> None:
    wanted, runs_on = places["coordinator"]
    assert runs_on == wanted


def test_blocks_of_other_nodes_come_before_they_are_needed(places: Any) -> None:
    assert places["ahead"] == [0, 1, 2, 3], "as many as `prefetch_batches` says, which is 3"
