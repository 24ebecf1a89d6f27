"""gpu_weights.py: weights are made by name, and the demo's routes fit a model with Mixtral's experts."""

from __future__ import annotations

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_weights
import pytest

from moe_local.cache.routes import Phase, read_routes
from moe_local.offload.plan import bandwidth


@pytest.mark.slow
def test_what_is_made_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Routes of the demo as it is, in this process; models and the pool of processes are stood in for."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_weights, "TOKENS", 4)
    command = importlib.import_module("moe_local.cli.main").main

    def run(words: list[str], **options: Any) -> None:
        with pytest.raises(SystemExit) as left:
            command(words[3:])
        assert left.value.code == 0

    monkeypatch.setattr(bandwidth, "SECONDS", 0.02)
    monkeypatch.setattr(gpu_weights, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    made: list[Any] = []
    describe = lambda name, layers: SimpleNamespace(  # noqa: E731
        name=name, experts_nbytes=10 * layers, dense_nbytes=1
    )
    monkeypatch.setattr(gpu_weights, "synthetic", SimpleNamespace(describe=describe, make=made.append))
    monkeypatch.setattr(gpu_weights, "ProcessPoolExecutor", lambda **options: ThreadPoolExecutor(1))
    routes = tmp_path / "below" / "routes.csv"
    for _ in range(2):  # the second finds the routes
        gpu_weights.main(["mixtral-8x7b:4", "qwen3-30b-a3b:2", "--routes", str(routes)])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{"benchmark": "gpu_w')]
    first, second = map(json.loads, said)
    assert [(model["name"], model["bytes"]) for model in first["models"]] == [
        ("mixtral-8x7b", 41),
        ("qwen3-30b-a3b", 21),
    ]
    assert [model.name for model in made] == 2 * ["mixtral-8x7b", "qwen3-30b-a3b"]
    assert second["home"] == str(tmp_path)
    found = read_routes(routes)
    assert (found.num_experts, found.top_k) == (8, 2)
    assert len(list(found.phase(Phase.DECODE))) >= 12 > 0 < len(list(found.phase(Phase.PREFILL)))
