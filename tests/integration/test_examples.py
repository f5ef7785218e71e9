"""Each of the examples runs, with little data, and says what it should."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT
from tests.integration.programs import Program

DEEP = {"ray_train.py"}
EXAMPLES = [
    pytest.param(path, id=path.name, marks=[pytest.mark.deep] if path.name in DEEP else [])
    for path in sorted((ROOT / "examples").glob("*.py"))
]

RUNS: dict[str, list[tuple[str, str]]] = {
    # The worker that died had seen 500 rows. Those that it had not committed came again.
    "actors.py": [("--rows 4000 --epochs 2 --crash", r"rows: \[4000, (3[5-9]|40)00\]\n")],
    "inference.py": [("--rows 600", r"sum of the answers: 359400\nbounded: True\n")],
    "ray_train.py": [("--rows 1000 --crash", r"steps: 20 epochs: 2\n")],
    "resume.py": [
        ("state.json --rows 3000 --epochs 1 --workers 2 --stop-after 3", r"rows: 600\n"),
        ("state.json --rows 3000 --epochs 1 --workers 3", r"rows: 2400\n"),
    ],
    "rl_loop.py": [("--prompts 400", r"prompts: 400\nlearnt: 400 trajectories, .* on average\n")],
    "train_and_validate.py": [
        ("--rows 8000 --epochs 2", r"(validated: 2 epochs, better: True\n){2}")
    ],
}
"""Arguments of each run of an example, and what it prints."""


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example: Path, run: Callable[[Program], str], tmp_path: Path) -> None:
    for arguments, expected in RUNS[example.name]:
        printed = run(Program(str(example), None, arguments.split(), str(tmp_path)))
        # Ray may have told of the worker that died, before.
        assert re.search(rf"^{expected}\Z", printed, re.M), printed
