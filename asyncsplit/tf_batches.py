"""Batches of TensorFlow tensors; this module imports tensorflow.

Upstream: ``iter_tf_batches`` in ``ray/data/iterator.py``.
"""

from functools import partial
from typing import Any

import tensorflow  # noqa: F401 - so that it is missed at once, not in the middle of an epoch

from asyncsplit import engine
from asyncsplit.collate import Recipe


def recipe(dtypes: Any) -> Recipe:
    """Return how to make what ``iter_tf_batches`` yields; arguments as there."""
    return Recipe("numpy", partial(engine.to_tf_tensors, dtypes=dtypes))
