"""Collects the loads that a layer waits for, and accounts for the time spent waiting."""

from __future__ import annotations

import time
from collections.abc import MutableSequence
from typing import Protocol

from moe_local.cache.keys import ExpertKey
from moe_local.offload.store.stalls import StallAccount
from moe_local.offload.system.interrupt import LOOK_SECONDS
from moe_local.offload.tiers.tiers import Tier


class Expecting(Protocol):
    """The state of one layer's loads, as `Arrivals` reads and updates it."""

    @property
    def layer(self) -> int: ...

    @property
    def waiting(self) -> list[int]:
        """Pinned, not readable yet."""

    @property
    def ready(self) -> MutableSequence[int]:
        """Pinned and readable, not handed out yet."""

    @property
    def late(self) -> set[int]:
        """Experts whose prefetch was still in flight when they were needed."""


class Arrivals:
    """Observes loads that complete in a tier, and charges the time spent waiting for them to a cause."""

    def __init__(self, tier: Tier, account: StallAccount) -> None:
        self._tier = tier
        self._account = account

    def collect(self, expecting: Expecting, most: int | None = None) -> None:
        """Move experts that became readable from `waiting` to `ready`, until `most` are there (None: all).

        A device's stream is made to wait for the copies of what is collected. Raises TransferError for an
        expert whose load failed.
        """
        for expert in tuple(expecting.waiting):
            if most is not None and len(expecting.ready) >= most:
                return
            there, waited = self._tier.claim(ExpertKey(expecting.layer, expert))
            if there:
                expecting.waiting.remove(expert)
                expecting.ready.append(expert)
            if waited is not None:
                self._account.add_wait("late_prefetch" if expert in expecting.late else "demand", waited)

    def wait(self, expecting: Expecting) -> None:
        """Block until some load makes progress, at most LOOK_SECONDS; charge the time to its cause."""
        cause = "late_prefetch"
        if expecting.waiting and (first := expecting.waiting[0]) not in expecting.late:
            cause = self._tier.cause(ExpertKey(expecting.layer, first))
        start = time.perf_counter()
        self._tier.source.wait(LOOK_SECONDS)
        self._tier.poll()
        self._account.add_stall(cause, time.perf_counter() - start)
