"""What the host does for a token, by the host's way and by the device's: a few tokens of it."""

from __future__ import annotations

import json

import pytest


def test_both_ways_are_measured(import_benchmark, capsys, tmp_path):
    file = tmp_path / "result.json"
    import_benchmark("host_part").main(["--tokens", "6", "--slots", "16", "--json", str(file)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(file.read_text())
    rates = document["hit_rate"]
    assert 0 < rates["by_host"] < 1
    assert rates["by_device"] == pytest.approx(rates["by_host"], abs=0.1)
    assert document["by_host_ms"] > 0
    assert all(ms > 0 for ms in document["by_device_ms"].values())


def test_without_a_gpu_the_other_says_so(import_benchmark, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^this needs a CUDA device$"):
        import_benchmark("device_misses").main([])
