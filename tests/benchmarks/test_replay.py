"""replay.py as a command: exactly one array, figures of the product's own replay, one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import replay as benchmark

from moe_local.cache.errors import OptionError
from moe_local.cache.policies import POLICIES
from moe_local.cache.replay import replay
from moe_local.cache.replay_tiers import replay_tiers
from moe_local.cache.routes import LayerBytes, LayerRoute, Phase, Routes, RouteStep, write_routes


@pytest.fixture
def routes(tmp_path: Path) -> tuple[Path, Routes]:
    """Two layers of eight experts; the first goes round six of them, the second one stays with three."""
    steps = []
    for number in range(24):
        chosen = [((2 * number) % 6, (2 * number + 1) % 6), (number % 3, (number + 1) % 3)]
        layers = [LayerRoute(i, e, (0.6, 0.4), (False,) * 2, (0,) * 2) for i, e in enumerate(chosen)]
        steps.append(RouteStep(0, Phase.DECODE, number, tuple(layers)))
    recording = Routes("tiny", "mixtral", 8, 2, (LayerBytes(100, 7),) * 2, tuple(steps))
    write_routes(tmp_path / "routes.csv", recording)
    return tmp_path / "routes.csv", recording


def test_json_is_exactly_one_array(routes: tuple[Path, Routes], capsys: pytest.CaptureFixture[str]) -> None:
    path, recording = routes
    assert benchmark.main(["--routes", str(path), "--slots", "3,4", "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [(row["slots_per_layer"], row["policy"]) for row in rows] == [
        (slots, policy) for slots in (3, 4) for policy in [*POLICIES, "belady"]
    ]
    for row in rows:
        assert set(row) == {"slots_per_layer", "policy", "hit_rate"}
        expected = replay(recording, row["slots_per_layer"], row["policy"])
        assert row["hit_rate"] == {"cold": expected.cold.hit_rate, "steady": expected.steady.hit_rate}
    rates = {(row["slots_per_layer"], row["policy"]): row["hit_rate"]["steady"] for row in rows}
    # The first layer's round of six misses always with LRU; the optimum keeps a part of it.
    assert rates[4, "lru"] == 0.5
    assert rates[4, "belady"] > 0.6
    assert "gap closed" in shown.err
    assert "were experts used without being kept" in shown.err


def test_a_table_of_chosen_policies(routes: tuple[Path, Routes], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--routes", str(routes[0]), "--slots", "4", "--policy", "belady,lru"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[1] for line in shown.out.splitlines()[2:4]] == ["belady", "lru"]
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--slots", "1"], 2, "1 slots per layer are too few for this recording; give 2 or more"),
        (["--slots", "4,x"], 2, "--slots '4,x': 'x' is not a number from 1 up"),
        (["--slots", "0"], 2, "'0' is not a number from 1 up"),
        (["--slots", "4", "--policy", "best"], 2, "'best' is not known; choose of lru, lfu"),
        (["--slots", "4", "--routes", "nowhere.csv"], 1, "cannot read routes from nowhere.csv"),
        (["--slots", "4", "--routes", __file__], 1, "only this version is read"),
    ],
)
def test_bad_input_is_one_line(
    routes: tuple[Path, Routes],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    assert benchmark.main(["--routes", str(routes[0]), *arguments, "--json"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert words in line


def test_a_truncated_recording_is_one_line(
    routes: tuple[Path, Routes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = routes[0]
    path.write_text(path.read_text().rpartition("\n")[0].rpartition("\n")[0])
    assert benchmark.main(["--routes", str(path), "--slots", "4"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert "ends with 1 experts of 2" in shown.err


def test_a_second_tier_below(routes: tuple[Path, Routes], capsys: pytest.CaptureFixture[str]) -> None:
    path, recording = routes
    command = ["--routes", str(path), "--slots", "2", "--policy", "lru,belady", "--below", "4"]
    assert benchmark.main(command) == 0
    (row,) = [
        line.split() for line in capsys.readouterr().out.splitlines() if line.split()[1:3] == ["4", "lru"]
    ]
    rates = replay_tiers(recording, 2, 4, "lru")
    with pytest.raises(OptionError, match="1 slots per layer are too few"):
        replay_tiers(recording, 1, 4, "lru")
    assert 0 < rates.reads < rates.copies
    assert row[3:5] == [f"{100 * rates.copies:.1f}", f"{100 * rates.reads:.1f}"]
