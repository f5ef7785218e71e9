"""Whatever `ray.data.DataIterator` has is here, or left out for a reason that the docs give."""

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data import DataIterator

from asyncsplit import AsyncDataIterator
from tests import parity

PAGE = Path(__file__).parents[2] / "docs/parity.md"


def test_the_page_is_that_of_the_classes() -> None:
    text = PAGE.read_text()
    minor = ".".join(ray.__version__.split(".")[:2])
    if f"Ray {minor} " not in text:
        pytest.skip(f"docs/parity.md is about another Ray than {ray.__version__}")
    assert text == parity.page(), "run .venv/bin/python -m tests.parity > docs/parity.md"


def test_every_reason_is_about_something_that_ray_has_and_we_do_not() -> None:
    theirs, ours = parity.methods(DataIterator), parity.methods(AsyncDataIterator)
    assert set(parity.METHODS) == set(theirs) - set(ours)
    assert set(parity.NOTES) <= set(theirs) & set(ours)
    for name, argument in parity.ARGUMENTS:
        assert argument in parity.arguments(theirs[name])


def test_a_new_method_of_ray_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataIterator, "iter_foo_batches", lambda self: None, raising=False)
    with pytest.raises(LookupError, match="iter_foo_batches"):
        parity.page()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda self, *, new=None: None, "takes new"),
        (lambda self, *, batch_size=1: None, "batch_size"),
    ],
)
def test_a_new_argument_or_default_of_ray_is_noticed(
    monkeypatch: pytest.MonkeyPatch, change: Any, says: str
) -> None:
    monkeypatch.setattr(DataIterator, "iter_tf_batches", change)
    with pytest.raises(LookupError, match=says):
        parity.page()
