"""benchmarks/quality.py on a tiny model: its plain runner, its figures, its picture."""

from __future__ import annotations

import argparse
import json

import pytest
import quality
import torch


@pytest.mark.slow
def test_a_mix_is_judged(tiny_mixtral, tmp_path):
    text = tmp_path / "text"
    text.write_text("the expert router sends each token of the text to the experts it trusts " * 80)
    options = argparse.Namespace(
        model=str(tiny_mixtral), text=text, calibrate=text, windows=2, tokens=512, bits=[6.0]
    )
    document = quality.measure(options)
    rows = {row["name"]: row for row in document["rows"]}
    for basis in ("text", "weights"):  # what harms least need not take every byte
        assert 5.5 < rows[f"mixed:6 {basis}"]["bits"] <= 6
    assert rows["int8"]["kl"]["mean"] < rows["mixed:6 text"]["kl"]["mean"] < rows["nf4"]["kl"]["mean"]
    assert rows["nf4"]["formats"]["nf4"] == 24
    same = next(pair for pair in document["pairs"] if pair["bits"] == rows["q2"]["bits"])
    assert same["low"] == same["ratio"] == same["high"] == 1
    assert rows["int8"]["top1"] > 0.9
    quality.draw(document, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(document)


def test_a_ratio_of_equals_is_one_and_of_twice_as_much_two():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0)) + 0.5
    assert quality.ratio(values, values) == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    found = quality.ratio(2 * values, values.flip(0))
    assert found["low"] < 2 < found["high"]
    low, high = quality.interval(values)
    assert low < float(values.mean()) < high
