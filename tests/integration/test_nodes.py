"""Several nodes: where blocks and coordinator are, and what becomes of a node's share of them."""

from typing import Any

import pytest

from tests.integration.nodes import BLOCKS, ROWS


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


def test_blocks_of_other_nodes_come_before_they_are_needed(places: Any) -> None:
    """As many as `prefetch_batches` says, which is 3."""
    assert places["large"] == [0, 1, 2, 3]
    assert set(range(33)) <= set(places["small"]) < set(range(80)), "and those fetched with them"


def test_a_worker_lost_with_its_node_and_all_blocks_is_replaced(play: Any) -> None:
    outcome = play("a worker's node is lost")
    assert outcome["errors"] == []
    assert outcome["rows"] == list(range(BLOCKS * ROWS)), "committed rows do not come again"
    assert len(outcome["runs"]) > BLOCKS, "blocks were lost"


def test_a_coordinator_lost_with_its_node_goes_on_elsewhere(play: Any) -> None:
    outcome = play("the node the coordinator was put on is lost")
    assert outcome["errors"] == []
    assert outcome["rows"] == list(range(BLOCKS * ROWS))
