"""Plain English that every Python installation carries: the language reference and library docstrings."""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

_SKIPPED = {
    "antigravity",
    "this",
    "idlelib",
    "turtledemo",
    "tkinter",
    "test",
    "lib2to3",
    "turtle",
    "ensurepip",
}
_HELD_OUT_SHARE = 25  # one document in 25 is kept for measuring
_SHUFFLE_SEED = 7


@lru_cache(maxsize=1)
def documents() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training, held-out) texts, in an order that depends only on the Python version."""
    texts = [*topics.values(), *_docstrings()]
    random.Random(_SHUFFLE_SEED).shuffle(texts)
    held_out = len(texts) // _HELD_OUT_SHARE
    return tuple(texts[held_out:]), tuple(texts[:held_out])


@lru_cache(maxsize=1)
def stray_words() -> tuple[str, ...]:
    """Ordinary English words from the language reference, sorted."""
    found = {word for text in list(topics.values())[:40] for word in re.findall(r"\b[a-z]{4,10}\b", text)}
    return tuple(sorted(found))


def _docstrings() -> list[str]:
    """Docstrings of more than 60 characters in the standard library's Python sources."""
    found = []
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        if name.startswith("_"):
            continue
        package = root / name
        files = sorted(package.glob("*.py")) if package.is_dir() else [root / f"{name}.py"]
        for file in filter(Path.is_file, files):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node)
                    if text and len(text) > 60:
                        found.append(text)
    return found
