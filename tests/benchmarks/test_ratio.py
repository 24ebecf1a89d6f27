"""Ratios of rounds, and the interval of their median."""

from __future__ import annotations

import random
import statistics

import pytest
import ratio


@pytest.mark.parametrize(
    ("count", "rank"), [(6, 1), (8, 1), (9, 2), (12, 3), (15, 4), (20, 6), (25, 8), (50, 18)]
)
def test_ranks_are_those_of_the_sign_test(count: int, rank: int) -> None:
    """The published ranks of distribution-free 95 % intervals."""
    values = random.Random(count).sample(range(1, count + 1), count)
    assert ratio.median_interval(values) == (rank, count + 1 - rank)


def test_too_few_rounds_have_no_interval() -> None:
    assert ratio.median_interval([1, 2, 3, 4, 5]) is None
    assert ratio.median_interval([]) is None
    assert str(ratio.Ratio.of([2.0], [1.0])) == "2.000 (no interval from 1 rounds)"


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    """Of a skewed distribution, as timings are; 0.961 expected for nine draws."""
    numbers = random.Random(0)
    runs = 4000
    held = 0
    for _ in range(runs):
        low, high = ratio.median_interval([numbers.lognormvariate(0, 1) for _ in range(9)])
        held += low <= 1.0 <= high
    assert held / runs == pytest.approx(0.961, abs=0.012)


def test_rounds_are_paired() -> None:
    """A machine that slows down all rounds alike changes nothing; one disturbed round, hardly anything."""
    pace = [1.0, 3.0, 2.0, 1.5, 9.0, 1.0, 4.0]
    ours = [1.2 * p for p in pace]
    steady = ratio.Ratio.of(ours, pace)
    assert (steady.median, steady.low, steady.high) == pytest.approx((1.2, 1.2, 1.2))
    disturbed = ratio.Ratio.of([*ours[:3], 0.01, *ours[4:]], pace)
    assert disturbed.median == pytest.approx(1.2)
    assert disturbed.low < 1.2
    assert statistics.mean(ours) != pytest.approx(1.2 * statistics.mean([*pace[:3], 0.01, *pace[4:]]))


def test_unequal_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        ratio.Ratio.of([1.0, 2.0], [1.0, 2.0, 3.0])
