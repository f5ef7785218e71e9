"""The tables of figures in the README and the docs are those of the last benchmarks."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import table


def test_the_pages_show_the_results_that_are_saved(tmp_path: Path) -> None:
    results = json.loads(table.FILE.read_text())
    for page, name in table.PAGES.items():
        copy = Path(shutil.copy(page, tmp_path))
        table.write(results, {copy: name})
        assert copy.read_text() == page.read_text(), "run `python -m benchmarks.table --write`"


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="0 places between"):
        table.write({}, {page: "tables"})
