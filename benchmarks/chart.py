"""Draws the ratios to Ray's iterator; needs the extra ``bench``."""

import warnings
from pathlib import Path
from typing import Any


def pyplot_for(file: Path) -> Any:
    """Return what draws a file; None, with a warning, if it is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        warnings.warn(
            f"{file} is not drawn: matplotlib is not installed, `pip install 'asyncsplit[bench]'`",
            stacklevel=3,
        )
        return None
    return pyplot


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw a bar for each figure that both sides have, with its spread over the rounds."""
    if (pyplot := pyplot_for(file)) is None:
        return
    bars = [
        (figure["name"], ratio)
        for result in results.values()
        for figure in result["figures"]
        if figure["class"] == "same work" and figure["unit"] in ("us", "ms", "s")
        for ratio in figure["ratios"]
        if (ratio["over"], ratio["under"]) == ("ray", "asyncsplit")
    ]
    if not bars:
        return
    bars.reverse()
    names = [name for name, _ in bars]
    ratios = [ratio["ratio_of_medians"] for _, ratio in bars]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.34 * len(bars)), layout="constrained")
    axes.barh(names, ratios, color="#3b6ea5")
    for place, (_, ratio) in enumerate(bars):
        spread = ratio["by_round"]
        axes.plot([spread["min"], spread["max"]], [place, place], color="black", linewidth=1)
        label = f"{ratio['ratio_of_medians']:.3g}"
        axes.text(max(spread["max"], ratios[place]) * 1.08, place, label, va="center")
        if ratio["target"]:
            bound = float(ratio["target"].split()[-1])
            axes.plot(bound, place, marker="|", color="#d62728", markersize=14, markeredgewidth=2)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.6)
    axes.set_xlabel(
        "Ray's time / asyncsplit's time: median, line: all rounds, red: target (log scale)"
    )
    version = next(iter(results.values()))["conditions"]["versions"]["ray"]
    axes.set_title(f"asyncsplit against streaming_split of Ray {version}, same work")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
