"""How many bytes may wait for a split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncsplit.core.budget import PREFETCH_BYTES, STORE_SHARE, is_short, prefetch_budget

SPLITS = st.integers(1, 2000)
STORES = st.floats(1, 2**45)


@given(asked=st.integers(1), n=SPLITS, store_bytes=st.none() | STORES)
def test_what_is_asked_for_stays_as_it_is(asked: int, n: int, store_bytes: float | None) -> None:
    assert prefetch_budget(asked, n, store_bytes) == asked


@given(n=SPLITS, store_bytes=STORES)
def test_all_splits_together_leave_most_of_the_store_to_others(n: int, store_bytes: float) -> None:
    budget = prefetch_budget(None, n, store_bytes)
    assert 1 <= budget <= PREFETCH_BYTES
    assert n * budget <= max(n, store_bytes * STORE_SHARE)


@given(n=SPLITS)
def test_a_large_store_gives_each_split_enough(n: int) -> None:
    assert prefetch_budget(None, n, n * PREFETCH_BYTES / STORE_SHARE) == PREFETCH_BYTES
    assert prefetch_budget(None, n, None) == PREFETCH_BYTES


@pytest.mark.parametrize(
    ("credit_bytes", "budget_bytes", "short"),
    [
        (0, 100, False),
        (50, 100, False),
        (51, 100, True),
        (100, 100, True),
        (0, 1, False),
        (1, 1, True),
    ],
)
def test_short_is_who_lacks_more_than_half(
    credit_bytes: int, budget_bytes: int, short: bool
) -> None:
    assert is_short(credit_bytes, budget_bytes) is short
