"""The house's own rules: who may import whom, how large a room may grow, and that all rooms are packaged."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "moe_local": ROOT / "src/moe_local",
    "moe_local.cache": ROOT / "cache",
    "moe_local.offload": ROOT / "offload",
    "moe_local.cli": ROOT / "cli",
    "moe_local.demo": ROOT / "demo",
}
MAX_LINES = 400
FORBIDDEN = {
    "cache": ("moe_local.offload", "moe_local.cli", "moe_local.demo", "torch", "transformers", "numpy"),
    "offload": ("moe_local.cli",),
    "demo": ("moe_local.cli", "moe_local.offload", "moe_local.cache"),
}

# Rooms of offload/ that others stand on: what each may import of the others.
LOW_ROOMS = {
    "modeling": set(),
    "system": set(),
    "native": {"quantize"},
    "dense": {"kernels", "modeling", "native", "quantize", "system"},
}


def modules(room: str) -> Iterator[Path]:
    return (ROOT / room).rglob("*.py")


def imports(path: Path) -> Iterator[str]:
    """Every module named in an import statement, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_go_one_way(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(room)
        for name in imports(path)
        if any(name == banned or name.startswith(banned + ".") for banned in FORBIDDEN[room])
    ]
    assert not wrong


@pytest.mark.parametrize("room", LOW_ROOMS)
def test_low_rooms_of_offload_know_no_higher_ones(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(f"offload/{room}")
        for name in imports(path)
        if name.startswith("moe_local.offload.") and name.split(".")[2] not in LOW_ROOMS[room] | {room}
    ]
    assert not wrong


def test_every_package_is_listed() -> None:
    """package-dir turns setuptools' discovery off: a package that is not listed is not installed."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for name, folder in ROOMS.items():
        for init in folder.rglob("__init__.py"):
            inner = init.parent.relative_to(folder).parts
            found.add(".".join((name, *inner)))
    assert found == set(settings["packages"])


def test_rooms_stay_readable() -> None:
    """A module of more than MAX_LINES lines is a design to reconsider. Tables of data are not code."""
    grown = [
        f"{path.relative_to(ROOT)} has {lines} lines"
        for room in ("cache", "offload", "cli", "demo", "benchmarks", "src")
        for path in modules(room)
        if (lines := len(path.read_text().splitlines())) > MAX_LINES and "wordings" not in path.name
    ]
    assert not grown


def test_no_module_is_shadowed_at_the_root() -> None:
    """A folder or file called moe_local at the root would be imported instead of the installed package."""
    assert not (ROOT / "moe_local").exists()
    assert not (ROOT / "moe_local.py").exists()
