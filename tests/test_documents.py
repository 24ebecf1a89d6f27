"""What the documents point at is there: files, headings, modules, rooms, variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "docs", "examples", "demo", "benchmarks")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
HISTORY = ("log.md", "CHANGELOG.md")
"""What tells of the past may name what is gone."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def headings(text: str) -> set[str]:
    """As GitHub makes anchors of them."""
    found = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), target
        assert not anchor or anchor in headings(path.read_text()), target


def modules_named(text: str) -> set[str]:
    """What stands in backticks and looks like a path in the repository."""
    found = re.findall(r"`([a-z_]+(?:/[\w.]+)+/?)`", text)
    return {path for path in found if (ROOT / path.split("/")[0]).is_dir() or is_room(path.split("/")[0])}


def is_room(folder: str) -> bool:
    return any((ROOT / house / folder).is_dir() for house in ("offload", "cli"))


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name not in HISTORY], ids=name)
def test_modules_that_are_named_are_there(document: Path) -> None:
    """With or without .py; offload's and cli's rooms also without the house."""
    places = (ROOT, ROOT / "offload", ROOT / "cli")
    for path in modules_named(document.read_text()):
        assert any((at / f"{path}{end}").exists() for at in places for end in ("", ".py")), path


def test_tests_that_are_named_are_there() -> None:
    known = {path.name for path in (ROOT / "tests").rglob("*.py")}
    for document in DOCUMENTS:
        if document.name not in HISTORY:
            assert set(re.findall(r"`(?:[\w/]+/)?(test_\w+\.py)`", document.read_text())) <= known, document


def test_architecture_has_every_room_and_every_module_outside_of_them() -> None:
    named = set(re.findall(r"`([\w/]+)`", ARCHITECTURE))
    rooms = [f"{path.parent.name}/" for path in (ROOT / "offload").glob("*/__init__.py")]
    loose = [path.stem for house in ("cache", "offload") for path in (ROOT / house).glob("*.py")]
    assert [room for room in rooms if room not in named] == []
    assert [module for module in loose if module != "__init__" and module not in named] == []


def test_modules_in_a_room_of_architecture_are_there() -> None:
    rows = re.findall(r"^\| `(\w+)/` \| (.*) \|$", ARCHITECTURE, re.M)
    assert rows
    for room, says in rows:
        for module in re.findall(r"`([a-z_0-9]+)`", says):
            assert (ROOT / "offload" / room / f"{module}.py").exists(), f"{room}/{module}"


def sources() -> str:
    houses = ("cache", "offload", "cli")
    return "".join(path.read_text() for house in houses for path in (ROOT / house).rglob("*.py"))


def test_classes_that_architecture_names_are_there() -> None:
    code = sources()
    named = re.findall(r"`([A-Z]\w*[a-z]\w*)(?:\.(\w+))?`", ARCHITECTURE)
    assert named
    for kind, attribute in named:
        assert re.search(rf"^class {kind}\b", code, re.M), kind
        assert not attribute or re.search(rf"^    def {attribute}\b|self\.{attribute} = ", code, re.M), (
            attribute
        )


def test_variables_that_are_named_exist() -> None:
    """Those of flags are click's, and in docs/cli.md, which is made from the commands."""
    known = set(re.findall(r"MOE_LOCAL_\w+", sources() + (ROOT / "docs" / "cli.md").read_text()))
    for document in DOCUMENTS:
        if document.name not in (*HISTORY, "cli.md"):
            assert set(re.findall(r"MOE_LOCAL_\w+", document.read_text())) <= known, document
