"""serving.py as a command: the same answers however many ask at a time, figures that add up, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import serving


def test_together_and_one_at_a_time(finished: Any) -> None:
    model = ("demo", "--slots", "3", "--device", "cpu", "--dense", "fp32")
    short = ("--clients", "3", "--rounds", "1", "--tokens", "4", "--prompt-tokens", "8")
    result = finished("serving", *model, *short)
    one, three = result["rows"]
    assert (one["clients"], three["clients"], result["requests"]) == (1, 3, 3)
    assert one["ratio"]["median"] == 1
    expected = three["tokens_per_s"]["median"] / one["tokens_per_s"]["median"]
    assert three["ratio"]["median"] == pytest.approx(expected)
    for row in (one, three):
        assert 0 < row["ttft_s"]["median"] <= row["ttft_s"]["p95"]
        assert row["tpot_s"]["median"] > 0
        assert row["misses_per_token"] > 0
        assert row["bytes_per_token"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either MODEL or --synthetic"),
        (["demo", "--rounds", "0"], "measure nothing"),
        (["demo", "--clients", "4", "--requests", "3"], "--requests 3 leave some of 4 clients idle"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        serving.main(arguments)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err
