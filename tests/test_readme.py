"""What README and docs say is true: code blocks run, links lead somewhere, commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.run_support import run_python, run_ready_python
from tests.source_support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code(page: Path) -> str:
    """All Python blocks of a page, one after another, as a reader would type them."""
    return "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))


def anchor(heading: str) -> str:
    """The anchor that a heading gets on the usual hosts."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_readme_example_prints_the_shape_of_fused_tokens_for_three_libraries(tmp_path: Path) -> None:
    lines = run_python("-c", code(ROOT / "README.md"), folder=tmp_path).splitlines()
    for family in ("timm", "open_clip", "transformers"):
        assert any(re.match(rf"{family} .*\(1, \d+, \d+\)$", line) for line in lines), lines
    # What README shows below the example is what it prints.
    assert "\n".join(lines) in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md" and code(page)], ids=name)
def test_python_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path) -> None:
    run_ready_python("-c", code(page), folder=tmp_path)


def test_the_page_on_own_projects_shows_the_code_of_its_example() -> None:
    example = (ROOT / "examples" / "use_in_your_project.py").read_text(encoding="utf-8")
    definitions = re.findall(
        r"^(?:class|def) .*?(?=^\S|\Z)", code(ROOT / "docs" / "using_in_your_project.md"), re.S | re.M
    )
    assert len(definitions) == 3
    assert [text for text in definitions if text.strip() not in example] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            broken.append(target)
        elif fragment and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            if fragment not in map(anchor, headings):
                broken.append(target)
    assert broken == []


def test_readme_names_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {command for page in PAGES for command in re.findall(r"\bmake ([a-z]+)\b(?! a)", _consoles(page))}
    assert {"demo", "test"} <= named
    assert named <= targets


def _consoles(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def test_layout_tree_names_files_that_exist() -> None:
    tree = re.search(r"^```text\n(layerfuse/.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert tree is not None
    missing, parent = [], Path()
    for line in tree[1].splitlines():
        entry = line.split("  ")[0].strip() or line.split()[0]
        path = parent / entry if line.startswith(" ") else Path(entry)
        parent = parent if line.startswith(" ") else Path(entry)
        if not (ROOT / path).exists():
            missing.append(path.as_posix())
    assert missing == []
