"""Evicts the expert first that was admitted first, regardless of use."""

from __future__ import annotations

from collections.abc import Sequence

from moe_local.cache.lru import LRUPolicy


class FIFOPolicy(LRUPolicy):
    """Eviction order by admission; use changes nothing. Other policies are measured against this one."""

    __slots__ = ()

    def touch(self, experts: Sequence[int], absent: Sequence[int] = ()) -> None:
        """Does nothing: the order is that of admission."""
