"""Fixtures of the tests with a real Prometheus or a real receiver."""

from pathlib import Path

import pytest


@pytest.fixture
def discovery(tmp_path: Path) -> Path:
    """Return the directory in which coordinators announce themselves."""
    directory = tmp_path / "discovery"
    directory.mkdir()
    return directory
