"""The design document's map of the code has every module."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_map_of_the_code_names_every_module() -> None:
    package = ROOT / "asyncsplit"
    modules = {*package.glob("*.py"), *package.glob("core/*.py")}
    modules -= {each for each in modules if each.name.startswith("__")}
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    unnamed = [each.name for each in modules if f"(../{each.relative_to(ROOT)})" not in text]
    assert not unnamed
