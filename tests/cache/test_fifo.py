from __future__ import annotations

from moe_local.cache.fifo import FIFOPolicy


def test_use_changes_nothing() -> None:
    policy = FIFOPolicy()
    for expert in (5, 3, 8):
        policy.insert(expert)
    policy.touch([5, 3])
    assert list(policy.coldest()) == [5, 3, 8]
