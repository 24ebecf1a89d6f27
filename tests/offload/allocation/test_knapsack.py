"""The solver against trying everything, and its bound against the truth."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.offload.allocation.knapsack import Choice, Option, hull, solve

OPTIONS = st.lists(
    st.builds(Option, st.integers(1, 12).map(lambda n: 4096 * n), st.floats(0, 100, width=32)),
    min_size=1,
    max_size=4,
)
ITEMS = st.lists(OPTIONS, min_size=1, max_size=5)


def brute_force(items: list[list[Option]], room: int) -> float:
    return min(
        math.fsum(option.cost for option in picked)
        for picked in itertools.product(*items)
        if sum(option.nbytes for option in picked) <= room
    )


def check_integrity(items: list[list[Option]], room: int, found: Choice) -> None:
    picked = [options[index] for options, index in zip(items, found.picked, strict=True)]
    assert sum(option.nbytes for option in picked) == found.nbytes <= room
    assert math.fsum(option.cost for option in picked) == found.cost
    assert found.bound <= found.cost


@settings(max_examples=120, deadline=None)
@given(ITEMS, st.floats(0, 1))
def test_against_trying_everything(items: list[list[Option]], share: float) -> None:
    least, most = (sum(f(o.nbytes for o in options) for options in items) for f in (min, max))
    room = int(least + share * (most - least))
    truth = brute_force(items, room)
    exact, steps = solve(items, room, exact=True), solve(items, room, exact=False)
    for found in (exact, steps):
        check_integrity(items, room, found)
        assert found == solve(items, room, exact=found is exact)
    assert exact.cost == pytest.approx(truth, abs=1e-9)
    assert exact.gap == 0
    assert steps.bound <= truth + 1e-9
    assert steps.cost >= truth - 1e-9
    if steps.gap == 0:
        assert steps.cost == pytest.approx(truth, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(OPTIONS)
def test_a_hull_is_convex_and_below_all(options: list[Option]) -> None:
    kept = [options[i] for i in hull(options)]
    assert kept[-1].cost == min(option.cost for option in options)
    gains = [(a.cost - b.cost) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(kept)]
    assert all(gain > 0 for gain in gains)
    assert gains == sorted(gains, reverse=True)
    for option in options:  # no option lies below a line between two of the hull
        for a, b in itertools.pairwise(kept):
            if a.nbytes <= option.nbytes <= b.nbytes:
                along = a.cost + (option.nbytes - a.nbytes) * (b.cost - a.cost) / (b.nbytes - a.nbytes)
                assert option.cost >= along - 1e-9


def test_many_items_are_close_to_the_best_possible() -> None:
    sizes = (2 << 20, 3 << 20, 4 << 20, 8 << 20)
    items = [
        [Option(size, (1 + 7919 * i % 97) * 4.0 ** (-size / (1 << 20))) for size in sizes] for i in range(256)
    ]
    room = 256 * 7 << 19  # 3.5 MiB each
    steps, exact = solve(items, room, exact=False), solve(items, room)
    assert steps.gap < 0.002
    assert exact.gap == 0
    assert steps.bound <= exact.cost <= steps.cost
    assert exact.nbytes <= room
    uniform = math.fsum(options[1].cost for options in items)
    assert steps.cost < uniform


def test_too_little_room() -> None:
    with pytest.raises(ValueError, match="take 8192 bytes, there are 8191"):
        solve([[Option(4096, 1.0)], [Option(4096, 2.0), Option(8192, 1.0)]], 8191)
    assert solve([[Option(4096, 1.0)], [Option(4096, 2.0), Option(8192, 1.0)]], 8192).picked == (0, 0)
