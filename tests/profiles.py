"""Settings of Hypothesis that go with the profile of the run, see `tests.conftest`."""

from hypothesis import settings

FEWER = settings(max_examples=settings().max_examples // 10 + 50)
"""For properties of data, of which an example takes milliseconds, not of what only counts."""
