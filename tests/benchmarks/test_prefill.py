"""prefill.py as a command: three ways side by side, figures that add up, bad arguments."""

from __future__ import annotations

import json
from typing import Any

import prefill
import pytest


@pytest.fixture(scope="module")
def result(run_benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    synthetic = ("--synthetic", "mixtral-tiny", "--layers", "2", "--device", "cpu", "--slots", "2")
    short = ("--prompt-tokens", "40", "--rounds", "2", "--json", str(home / "result.json"))
    document: dict[str, Any] = json.loads(run_benchmark("prefill", home, *synthetic, *short)[-1])
    assert json.loads((home / "result.json").read_text()) == document
    return document


def test_the_three_ways_are_measured_side_by_side(result: dict[str, Any]) -> None:
    assert [row["name"] for row in result["rows"]] == ["all resident", "ring, 2 slots", "old way, 2 slots"]
    resident, ring, old = result["rows"]
    assert resident["moved_bytes"] == 0
    assert resident["time_over_floor"]["median"] == 1
    assert result["staging"] == {"vram": 0, "ram": 2}
    for row in (ring, old):
        assert row["moved_bytes"] >= 2 * 6 * 0.5 * result["expert_bytes"]
        # The median of two rounds is their mean, which lies between these however the rates vary.
        rates = row["bytes_per_s"]["disk"]
        fastest, slowest = row["moved_bytes"] / rates["max"], row["moved_bytes"] / rates["min"]
        assert fastest * 0.999 <= row["link_s"] <= slowest * 1.001
        assert row["floor_s"] <= row["sum_s"]
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
    (gain,) = result["old_over_ring"]
    assert gain["rounds"] == 2
    assert old["seconds"]["min"] / ring["seconds"]["max"] <= gain["median"] * 1.001


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "give either MODEL or --synthetic"), (["demo", "--rounds", "0"], "--rounds 0 measures nothing")],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        prefill.main(arguments)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err


def test_models_that_do_not_fit_are_refused_in_one_line(make_checkpoint: Any) -> None:
    with pytest.raises(
        SystemExit, match=r"^error: .* does not fit: .*more than the 64.0 KiB there are[^\n]*$"
    ):
        prefill.main([str(make_checkpoint("mixtral")), "--ram", "64KiB", "--device", "cpu"])
