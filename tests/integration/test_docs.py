"""Every Python block of the documentation runs and prints what it says; every reference leads."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from asyncsplit import engine, errors
from tests.integration.conftest import ROOT
from tests.integration.programs import Program

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

# On the line before a Python block: <!-- not run: why -->
NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->\s*", re.S)

PYTHON_FENCE = re.compile(r"^[\s>]*(?:`{3,}|~{3,})\W*(?:py|ipy)", re.M | re.I)


class Example(NamedTuple):
    """A Python block, what the block after it says is printed, and why it is not run, if so."""

    place: str
    code: str
    printed: str | None
    reason: str | None


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def language(token: Token) -> str:
    return token.info.strip() if token.type == "fence" else ""


def examples_of(page: Path) -> Iterator[Example]:
    parsed = tokens(page)
    neighbours = zip([None, *parsed], parsed, [*parsed[1:], None], strict=False)
    for before, block, after in neighbours:
        if language(block) == "python":
            excuse = NOT_RUN.fullmatch(before.content) if before is not None else None
            yield Example(
                f"{name(page)}:{block.map[0] + 1 if block.map else '?'}",
                block.content,
                after.content if after is not None and language(after) == "text" else None,
                excuse[1] if excuse else None,
            )


EXAMPLES = [example for page in PAGES for example in examples_of(page)]
RUN = {
    page: runs
    for page in PAGES
    if (runs := [e for e in EXAMPLES if e.place.startswith(f"{name(page)}:") and not e.reason])
}
NOT_RUN_HERE = [example for example in EXAMPLES if example.reason]


@pytest.mark.parametrize("page", RUN, ids=name)
def test_python_blocks_run_and_print_what_is_said(
    page: Path, run: Callable[[Program], str], tmp_path: Path
) -> None:
    for example in RUN[page]:
        printed = run(Program(example.place, example.code, [], str(tmp_path)))
        if example.printed is not None:
            # Ray prints its node's warnings among what the program prints.
            said = printed.splitlines(keepends=True)
            own = "".join(one for one in said if "(raylet)" not in one)
            assert own == example.printed, example.place


@pytest.mark.parametrize("example", NOT_RUN_HERE, ids=[each.place for each in NOT_RUN_HERE])
def test_a_block_that_is_not_run_is_python_and_has_a_reason(example: Example) -> None:
    compile(example.code, example.place, "exec")
    pytest.skip(f"{example.place} is not run: {example.reason}")


def test_the_readme_has_an_example_that_runs() -> None:
    assert [e for e in EXAMPLES if e.place.startswith("README.md:") and not e.reason]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_python_block_escapes(page: Path) -> None:
    """One that is not found, or is excused without a reason, would be skipped in silence."""
    parsed = tokens(page)
    assert not [t.content for t in parsed if t.type == "code_block"], "fence code, do not indent it"
    fences = [t for t in parsed if t.type == "fence"]
    assert all(map(language, fences)), "a fence says its language, 'text' if it is none"
    python = [t for t in fences if language(t) == "python"]
    assert len(PYTHON_FENCE.findall(page.read_text())) == len(python), "the language is 'python'"
    for token, following in pairwise([*parsed, Token("end", "", 0)]):
        if token.type == "html_block" and re.match(r"<!--\s*not\s+run", token.content, re.I):
            marker = NOT_RUN.fullmatch(token.content)
            assert marker, f"write '<!-- not run: why -->', not {token.content!r}"
            assert marker[1], "an example is not run for a reason"
            assert language(following) == "python", f"{token.content!r} stands before no example"


def links_of(page: Path) -> Iterator[tuple[str, str]]:
    """Yield text and target of each link to a file of the repository."""
    for inline in tokens(page):
        children = inline.children or []
        for index, token in enumerate(children):
            if token.type == "link_open":
                target = str(token.attrs["href"])
                if "://" not in target:
                    yield children[index + 1].content, target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_to_tests_that_exist(page: Path) -> None:
    for text, target in links_of(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name(page)} links to {target}"
        elif anchor:
            defined = re.search(rf"^ *(async )?(def )?{anchor}\b", file.read_text(), re.M)
            assert defined, f"{name(page)} links to {target}"
        if text.startswith("test_") and not text.endswith(".py"):
            defined = re.search(rf"^ *(async )?def {text}\(", file.read_text(), re.M)
            assert defined, f"{name(page)} names {text}, which is not in {path}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    parsed = tokens(page)
    headings = [b.content for a, b in pairwise(parsed) if a.type == "heading_open"]
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_the_readme_names_the_supported_versions_of_ray() -> None:
    assert f"`ray{engine.SUPPORTED_RAY}`" in (ROOT / "README.md").read_text()


def test_each_error_can_be_looked_up() -> None:
    public = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.AsyncSplitError)
    }
    page = ROOT / "docs" / "troubleshooting.md"
    headings = {b.content for a, b in pairwise(tokens(page)) if a.type == "heading_open"}
    assert public <= headings
