"""What a coordinator is made of, in pieces."""

import pytest

from asyncsplit.parcel import PIECE_BYTES, pack, unpack


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, 10 * PIECE_BYTES + 1])
def test_a_value_comes_back_from_pieces_of_bounded_size(size: int) -> None:
    value = {"name": "flights", "bytes": bytes(size), "code": lambda row: row + size}
    pieces, refs = pack(value)
    assert refs == []
    assert max(map(len, pieces)) <= PIECE_BYTES
    again = unpack(pieces)
    assert again["bytes"] == value["bytes"]
    assert again["code"](1) == 1 + size
