"""The benchmark runs, prints its figures beside the targets, and leaves them as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import cache_overhead
import pytest

from moe_local.cache.routes import LayerBytes, LayerRoute, Phase, Routes, RouteStep, write_routes


def record(path: Path) -> None:
    """Write routes of 24 decoded tokens, 6 experts a layer."""
    steps = []
    for number, token in enumerate(cache_overhead.zipf_tokens(seed=1)):
        layers = tuple(
            LayerRoute(layer, tuple(experts[:6]), (1 / 6,) * 6, (False,) * 6, (0,) * 6)
            for layer, experts in enumerate(token)
        )
        steps.append(RouteStep(0, Phase.DECODE, number, layers))
    sizes = (LayerBytes(1, 1),) * cache_overhead.LAYERS
    write_routes(path, Routes("m", "a", cache_overhead.EXPERTS, 6, sizes, tuple(steps)))


def test_one_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_overhead, "TOKENS", 24)
    monkeypatch.setattr(cache_overhead, "RECORDED", tmp_path / "recorded.csv")
    record(tmp_path / "recorded.csv")
    result = tmp_path / "result.json"
    assert cache_overhead.main(["--rounds", "1", "--policy", "fifo", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert json.loads(result.read_text()) == document
    cases = document["cases"]
    assert cases.keys() == {"floor", "layer", "all_hits", "zipf", "recorded"}
    assert cases["layer"]["target_us"] == 15
    assert cases["all_hits"]["target_us"] == 1000
    for name in ("zipf", "recorded"):
        assert cases[name]["hit_rate"] == pytest.approx(0.8, abs=0.05)
    assert 0 < cases["floor"]["median_us"] < cases["layer"]["median_us"] < cases["all_hits"]["median_us"]
    assert "acquire + release of 8 resident experts" in printed


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cache_overhead.main(["--rounds", "0"])
    assert left.value.code == 2
    assert "--rounds 0 measures nothing" in capsys.readouterr().err
