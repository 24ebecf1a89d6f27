"""mixed_slots.py as a command: one array, in which no cache finds more than one that packs its bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import mixed_slots
import pytest

from moe_local.cache.routes import LayerBytes, LayerRoute, Phase, Routes, RouteStep, write_routes


@pytest.fixture
def routes(tmp_path: Path) -> Path:
    """Forty experts, of which the first ones are needed most."""
    chance, steps = random.Random(0), []
    for number in range(150):
        chosen = dict.fromkeys(min(39, int(chance.expovariate(0.1))) for _ in range(9))
        experts = tuple(chosen)[:2] if len(chosen) > 1 else (0, 1)
        layers = (LayerRoute(0, experts, (0.6, 0.4), (False,) * 2, (0,) * 2),)
        steps.append(RouteStep(0, Phase.DECODE, number, layers))
    path = tmp_path / "routes.csv"
    write_routes(path, Routes("tiny", "mixtral", 40, 2, (LayerBytes(100, 7),), tuple(steps)))
    return path


def test_one_array_of_what_was_there(routes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixed_slots.main(["--routes", str(routes), "--policy", "lru", "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [(row["bits"], row["share"]) for row in rows] == [
        (bits, share) for bits in ("chance", "use") for share in mixed_slots.BUDGETS
    ]
    assert "share of needed bytes" in shown.err
    for row in rows:
        assert 0 < row["largest"] < 1
        assert 0 < row["ladder"] <= row["packed"] + 0.05
    by_use = [(row["ladder"], row["unknown"]) for row in rows if row["bits"] == "use"]
    assert sum(known for known, _ in by_use) > sum(unknown for _, unknown in by_use)  # slots follow use
    assert mixed_slots.main(["--routes", str(routes.parent / "none.csv")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
