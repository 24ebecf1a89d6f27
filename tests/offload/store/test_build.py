"""How a store is wired: when the page cache is left out of it."""

from __future__ import annotations

import pytest

from moe_local.offload.store.build import past_page_cache

GIB = 2**30


@pytest.mark.parametrize(
    ("total", "arena", "free", "direct"),
    [
        (24 * GIB, 20 * GIB, 23 * GIB, True),  # larger than RAM
        (12 * GIB, 3 * GIB, 23 * GIB, False),  # few slots by choice: the page cache has room for everything
        (12 * GIB, 8 * GIB, 16 * GIB, True),  # it has no room beside the slots
        (12 * GIB, 12 * GIB, 16 * GIB, False),  # read once; the next load may find some of it
        (12 * GIB, 12 * GIB, 11 * GIB, True),
    ],
)
def test_experts_are_read_past_a_page_cache_that_would_not_keep_them(
    total: int, arena: int, free: int, direct: bool
) -> None:
    assert past_page_cache(total, arena, free) is direct
