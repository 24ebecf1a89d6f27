"""What a tier keeps beside the one above it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_local.cache.beside import Beside
from moe_local.cache.errors import OptionError
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.replay_tiers import replay_tiers
from moe_local.cache.routes import read_routes


def bring(cache: ExpertCache, layer: int, *experts: int) -> None:
    for expert in cache.acquire(layer, experts).load:
        cache.complete(layer, expert)
    cache.release(layer, experts)
    cache.check_integrity()


def tiers(above: int = 4, below: int = 4, layers: int = 2) -> tuple[ExpertCache, ExpertCache, Beside]:
    made = Beside("lru", layers)
    lower, upper = ExpertCache([below] * layers, made), ExpertCache([above] * layers, "lru")
    made.above = upper
    return upper, lower, made


def evicted_for(lower: ExpertCache, layer: int, expert: int) -> int:
    before = set(lower.residents(layer))
    bring(lower, layer, expert)
    (gone,) = before - set(lower.residents(layer))
    return gone


def test_cold_copies_of_what_is_safe_above_go_first() -> None:
    upper, lower, _ = tiers()
    for expert in (4, 3, 2, 5):
        bring(lower, 1, expert)
    for expert in (0, 1, 2, 3):  # 2 and 3 are the hotter half above
        bring(upper, 1, expert)
    assert [evicted_for(lower, 1, expert) for expert in (6, 7, 0)] == [3, 2, 4]


def test_copies_that_were_read_lately_stay_for_a_while() -> None:
    upper, lower, _ = tiers()
    for expert in (4, 5, 2, 3):
        bring(lower, 1, expert)
    for expert in (0, 1, 2, 3):
        bring(upper, 1, expert)
    assert [evicted_for(lower, 1, expert) for expert in (6, 7)] == [4, 2]


def test_copies_of_what_will_leave_above_are_kept() -> None:
    upper, lower, _ = tiers()
    for expert in (4, 1, 0, 5):
        bring(lower, 1, expert)
    for expert in (0, 1, 2, 3):
        bring(upper, 1, expert)
    assert [evicted_for(lower, 1, expert) for expert in (6, 7)] == [4, 1]


def test_what_is_on_its_way_up_is_not_safe_there_yet() -> None:
    upper, lower, _ = tiers(above=2)
    for expert in (4, 1, 0, 5):
        bring(lower, 0, expert)
    upper.acquire(0, [0, 1])
    assert evicted_for(lower, 0, 6) == 4
    upper.complete(0, 0)
    upper.complete(0, 1)
    for expert in (1, 0):  # copied again
        bring(lower, 0, expert)
    assert evicted_for(lower, 0, 7) == 5
    assert evicted_for(lower, 0, 4) == 1


def test_other_layers_do_not_matter() -> None:
    upper, lower, _ = tiers()
    for expert in (4, 3, 2, 5):
        bring(lower, 0, expert)
    for expert in (0, 1, 2, 3):
        bring(upper, 1, expert)
    assert evicted_for(lower, 0, 6) == 4


def test_without_a_tier_above_the_policy_decides() -> None:
    upper, lower, made = tiers()
    made.above = None
    for expert in (4, 5, 2, 3):
        bring(lower, 0, expert)
        bring(upper, 0, expert)
    assert evicted_for(lower, 0, 6) == 4


def test_an_emptied_cache_begins_anew_with_the_first_layer() -> None:
    upper, lower, _ = tiers()
    lower.empty()
    for expert in (4, 2, 3, 5):
        bring(lower, 1, expert)
    for expert in (0, 1, 2, 3):
        bring(upper, 1, expert)
    assert evicted_for(lower, 1, 6) == 2


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(OptionError, match="'none' is not known"):
        Beside("none", 2)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b_top6.csv", "gemma-4-26b-a4b_top6.csv"])
def test_recorded_routes_read_less_from_disk(name: str, repository: Path) -> None:
    path = repository.parent / "shared" / "data" / "routes" / name
    if not path.exists():
        pytest.skip(f"recorded routes are not at {path}")
    routes = read_routes(path)
    minding, plain = (replay_tiers(routes, 32, 32, beside=beside) for beside in (True, False))
    assert minding.copies == plain.copies
    assert minding.reads < 0.92 * plain.reads
