"""examples/ runs as it stands, and says what it should."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_local.cache import policies
from moe_local.offload.prefetch import names

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
EXPECTED = {
    "generate": r"\w+ mode\nAn expert is .*\n\d+ tokens, ended by stop\n[1-9]\d* experts .* [1-9]\d* had",
    "stream": r">>> What is an expert\?\nAn expert is .*\n    waited [\d.]+ ms for experts\n>>> Why does ",
    "client": r"The router multiplies .*",
    "own_policy": r"second-chance: [\d.]+ % hits\n(.+)\nlru: [\d.]+ % hits\n\1",
    "own_prefetcher": r"last-time: \d+ misses, [1-9]\d* of \d+ guesses used\nrouter: .*\noff: \d+ .*, 0 of 0",
}


@pytest.fixture(autouse=True)
def _forget_what_examples_register() -> Iterator[None]:
    registries = (policies.POLICIES, policies._own, names.OWN)
    before = [dict(registry) for registry in registries]
    yield
    for registry, known in zip(registries, before, strict=True):
        registry.clear()
        registry.update(known)


def test_every_example_is_listed() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names == set(EXPECTED)
    listed = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES[0].parent / "README.md").read_text())
    assert set(listed) == names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert re.match(EXPECTED[path.stem], capfd.readouterr().out)
