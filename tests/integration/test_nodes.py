"""Several nodes: where blocks and coordinator are, and what becomes of a node's share of them."""

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


def test_blocks_of_other_nodes_come_before_they_are_needed(places: Any) -> None:
    """As many as `prefetch_batches` says, which is 3."""
    assert places["large"] == [0, 1, 2, 3]
    assert set(range(33)) <= set(places["small"]) < set(range(80)), "and those fetched with them"
