"""report.py, and what all benchmarks have in common: help, a line where a GPU is needed, one object."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import report


def test_the_last_line_is_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"benchmark": "this", "ms": [1.5, 2.0], **report.versions()}
    report.finish(result, None)
    report.finish(result, tmp_path / "out.json")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [result, result]
    assert json.loads((tmp_path / "out.json").read_text()) == result


def test_all_have_their_turn_in_each_round_and_the_first_warms_up() -> None:
    turns: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        return lambda: turns.append(name) or float(len(turns))

    found = report.in_rounds({"a": measure("a"), "b": measure("b")}, 2)
    assert turns == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize("name", ["gpu_kernels", "gpu_attention", "device_misses", "resident"])
def test_without_a_gpu_they_say_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=rf"^{name}\.py needs a CUDA device, and torch finds none$"):
        importlib.import_module(name).main([])


def test_each_asks_a_question_and_its_help_is_that(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        path.stem
        for path in sorted((repository / "benchmarks").glob("*.py"))
        if "parser_of(__doc__" in path.read_text()
    ]
    assert len(asked) > 15
    for name in asked:
        module = importlib.import_module(name)
        monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit) as left:
            module.main()
        assert left.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        assert " ".join((module.__doc__ or "").partition("\n")[0].split()) in said
        assert "--json FILE" in said
