"""Draws the series of a soak; needs the extra ``bench``."""

from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from benchmarks.chart import pyplot_for
from tests.soak.measure import Sample

PANELS = {
    "memory_mb": "anonymous memory, MB",
    "threads": "threads",
    "fds": "file descriptors",
    "own_objects": "objects of asyncsplit's classes",
    "items": "items in asyncsplit's containers",
}


def draw(samples: Sequence[Sample], file: Path) -> None:
    """Draw each figure over the epochs, a line for each process."""
    if (pyplot := pyplot_for(file)) is None:
        return
    epochs = [sample.epoch for sample in samples]
    figure, grid = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained", sharex=True)
    *panels, last = grid.flat
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        for process in ("coordinator", "consumer", "driver"):
            axes.plot(epochs, list(map(attrgetter(f"{process}.{name}"), samples)), label=process)
        axes.set_title(title)
    last.plot(epochs, [sample.store_mb for sample in samples], color="black")
    last.set_title("object store, MB")
    for axes in grid.flat:
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    panels[0].legend()
    figure.supxlabel(f"epochs; {samples[-1].kills} consumers were killed in the course of them")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
