"""Copies held to a slower link: what is asked for, and what a plan makes of it. The spinning needs a GPU."""

from __future__ import annotations

import pytest

from moe_local.cache.errors import OptionError
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.tiers.slow_link import VARIABLE, held, link_limit, spin_cycles


def test_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = Bandwidths(h2d=50e9)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert link_limit() is None
    assert held(speeds) is speeds
    monkeypatch.setenv(VARIABLE, "25GB")
    assert held(speeds).h2d == 25e9
    assert held(Bandwidths(h2d=12e9)).h2d == 12e9
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(OptionError, match=f"{VARIABLE} 'fast' is not a size"):
        link_limit()


def test_cycles_make_up_the_difference() -> None:
    """100 MB take 2 ms at 50 GB/s, 4 ms at 25; in 2 ms a 2 GHz clock ticks 4 million times."""
    cycles = spin_cycles(1 / 25e9, 1 / 50e9, 1 / 2e9)
    assert cycles * 100e6 == pytest.approx(4e6)
    assert spin_cycles(1 / 60e9, 1 / 50e9, 1 / 2e9) == 0
