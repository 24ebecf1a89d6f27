"""Which of two ways is faster, and how many layers ahead to look: decided on tokens whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from moe_local.offload.prefetch.comparison import BLOCK, MOST_PAIRS, Comparison, Gain
from moe_local.offload.prefetch.pilot import LONGEST_REST, SHORTEST_REST, WARM_UP, Pilot

Truth = Callable[[int], float]
"""Lookahead -> mean seconds a token."""


def noisy(rng: random.Random, mean: float, sigma: float = 0.1) -> float:
    """As tokens are: some longer by a few misses, one in a hundred by a pause of the process."""
    return mean * rng.lognormvariate(-sigma * sigma / 2, sigma) * (30 if rng.random() < 0.01 else 1)


def compare(
    incumbent: float, challenger: float, seed: int, *, modest: bool = False
) -> tuple[bool, Comparison]:
    rng, comparison = random.Random(seed), Comparison(modest=modest)
    for _ in range(10_000):
        mean = challenger if comparison.challenging else incumbent
        verdict = comparison.saw(noisy(rng, mean))
        if verdict is not None:
            return verdict, comparison
    raise AssertionError("no verdict")


@pytest.mark.parametrize("change", [0.5, 0.8, 1.25, 2.0])
def test_a_clear_difference_is_seen_soon(change: float) -> None:
    for seed in range(100):
        won, comparison = compare(1.0, change, seed)
        assert won == (change < 1), seed
        assert sum(comparison.tokens) <= 2 * MOST_PAIRS * BLOCK
        if not 0.7 < change < 1.4:
            assert max(comparison.tokens) <= 6 * BLOCK


def test_equal_ways_leave_the_incumbent() -> None:
    wins = sum(compare(1.0, 1.0, seed)[0] for seed in range(150))
    assert wins <= 18  # several looks at an interval of 95 %
    assert max(sum(compare(1.0, 1.0, seed)[1].tokens) for seed in range(20)) <= 2 * MOST_PAIRS * BLOCK


def test_a_modest_challenger_wins_where_the_incumbent_is_not_better() -> None:
    wins = sum(compare(1.0, 0.98, seed, modest=True)[0] for seed in range(100))
    assert wins > 60
    assert sum(compare(1.0, 0.98, seed)[0] for seed in range(100)) < wins


def test_the_interval_holds_the_true_gain() -> None:
    held = 0
    for seed in range(100):
        rng, comparison = random.Random(seed), Comparison()
        for _ in range(2 * 8 * BLOCK):
            comparison.saw((0.9 if comparison.challenging else 1.0) * rng.lognormvariate(0, 0.1))
        gain = comparison.gain()
        assert gain is not None
        assert gain.low is not None
        assert gain.high is not None
        held += gain.low <= 0.1 <= gain.high
    assert held >= 88


def test_turns_alternate_in_pairs_and_unmeasured_ones_are_taken_again() -> None:
    comparison, turns = Comparison(), []
    for _ in range(4 * BLOCK):
        turns.append(comparison.challenging)
        assert comparison.saw(1.0) is None
    a, b = [False] * BLOCK, [True] * BLOCK
    assert turns == [*a, *b, *b, *a]
    comparison = Comparison()
    for _ in range(BLOCK):
        assert comparison.saw(None) is None
    assert not comparison.challenging
    assert comparison.gain() is None
    assert comparison.token_s == (0.0, 0.0)


def test_gains_are_turned_round_and_added() -> None:
    assert Gain(1.0, 0.5, 2.0).reversed() == Gain(-1.0, -2.0, -0.5)
    assert Gain(1.0, None, None).reversed() == Gain(-1.0, None, None)
    assert Gain(1.0, 0.5, 2.0).plus(Gain(0.5, 0.25, 1.0)) == Gain(1.5, 0.75, 3.0)
    assert Gain(1.0, 0.5, 2.0).plus(Gain(0.5, None, None)) == Gain(1.5, None, None)


def fly(
    truth: Truth, tokens: int, seed: int, most: int = 4, after: int = 0
) -> tuple[Pilot, float, list[int]]:
    """The pilot, the mean of the true seconds of its choices, and these, the first `after` left out."""
    rng, pilot, chosen = random.Random(seed), Pilot(most), []
    for _ in range(tokens):
        chosen.append(pilot.lookahead)
        pilot.step(noisy(rng, truth(pilot.lookahead)))
    chosen = chosen[after:]
    return pilot, sum(map(truth, chosen)) / len(chosen), chosen


@pytest.mark.parametrize("loss", [0.02, 0.1, 0.3, 1.0])
def test_where_prefetch_costs_it_is_off_and_trying_costs_little(loss: float) -> None:
    for seed in range(20):
        pilot, mean, _ = fly(lambda d: 1 + loss * d, 4000, seed)
        assert mean < 1.02, (seed, mean)
    assert pilot.outlook.state == "off"
    assert pilot.outlook.gain is not None
    assert pilot.outlook.gain.seconds < 0


@pytest.mark.parametrize(
    ("truth", "best"),
    [
        ({0: 1.0, 1: 0.8, 2: 0.85, 3: 0.9, 4: 1.0}, (1,)),
        ({0: 1.0, 1: 0.9, 2: 0.8, 3: 0.7, 4: 0.75}, (3,)),
        ({0: 1.0, 1: 1.05, 2: 0.8, 3: 0.9, 4: 1.0}, (2,)),  # only two ahead is of use
        ({0: 1.0, 1: 0.6, 2: 0.6, 3: 0.6, 4: 0.6}, (1, 2, 3, 4)),
    ],
)
def test_the_best_lookahead_is_found_and_kept(truth: dict[int, float], best: tuple[int, ...]) -> None:
    means, hits = [], []
    for seed in range(10):
        pilot, mean, chosen = fly(truth.__getitem__, 6000, seed, after=2000)
        means.append(mean)
        hits.append(sum(d in best for d in chosen) / len(chosen))
        assert pilot.outlook.state == "on", seed
        assert pilot.outlook.gain is not None
        assert pilot.outlook.gain.seconds == pytest.approx(1 - min(truth.values()), abs=0.15)
    least = min(truth.values())
    assert max(means) < least + 0.1, means
    assert sum(means) / len(means) < least + 0.02, means
    assert sum(hits) / len(hits) > 0.8, hits


def test_it_notices_when_things_change() -> None:
    for better, worse in ((0.7, 1.3), (1.3, 0.7)):
        rng, pilot = random.Random(1), Pilot(1)
        for gain in (better, worse):
            for _ in range(6000):
                pilot.step(noisy(rng, gain if pilot.lookahead else 1.0))
            assert bool(pilot.lookahead) == (gain < 1)


def test_nothing_is_tried_while_nothing_can_be_gained() -> None:
    allowed = False
    pilot = Pilot(2, lambda: allowed)
    for _ in range(WARM_UP + 3 * SHORTEST_REST):
        pilot.step(1.0)
        assert pilot.lookahead == 0
    assert pilot.outlook == ("off", 0, None) or (pilot.outlook.state, pilot.outlook.gain) == ("off", None)
    allowed = True
    for _ in range(SHORTEST_REST + 2 * BLOCK):
        pilot.step(1.0)
    assert pilot.lookahead == 1


def test_states_are_told_as_they_come() -> None:
    pilot = Pilot(1)
    states = [pilot.outlook.state]
    for _ in range(200):
        if pilot.step(0.5 if pilot.lookahead else 1.0):
            states.append(pilot.outlook.state)
    assert states == ["off", "trying", "on", *["on"] * (len(states) - 3)]
    assert LONGEST_REST >= SHORTEST_REST
