"""Applies the scheduler's splits to the store's tiers: pins what the CPU computes, and promotes experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moe_local.cache.expert_cache import Acquisition
from moe_local.cache.keys import ExpertKey
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.schedule.costs import Work
from moe_local.offload.schedule.scheduler import MissScheduler, Needed
from moe_local.offload.tiers.copies import CopySource
from moe_local.offload.tiers.tiers import Tier

PROMOTION = 1 << 20
"""Priority of a promotion's copy: after all others."""


class Share(NamedTuple):
    """A step's experts of one layer, divided between CPU and device."""

    host: list[int]
    """Computed by the CPU; pinned in RAM until they are released."""
    device: list[int]
    """All others, in the order in which they should be acquired."""


class HostShare:
    """Divides a layer's experts between host and device, and promotes experts that the CPU computed.

    The CPU is only given experts whose bytes are in RAM. One that is on disk, or whose prefetch waits for
    the disk, is brought to the device as usual, since the read is most of its cost.
    """

    def __init__(
        self,
        tier: Tier,
        below: Tier,
        copies: CopySource,
        layouts: Sequence[Sequence[Layout]],
        scheduler: MissScheduler,
    ) -> None:
        """`tier` is the device's, filled by `copies` from `below` in RAM; `scheduler` observes the copies."""
        self.scheduler = scheduler
        self._tier = tier
        self._below = below
        self._copies = copies
        self._layouts = layouts
        self._waits_for_host = False
        copies.watch = scheduler

    def divide(self, layer: int, experts: Sequence[int], tokens: Callable[[int], int]) -> Share:
        """Divide a step's experts, each of which has `tokens(expert)` tokens.

        Counts the host's share as misses and pins it in RAM.
        """
        cache, below = self._tier.cache, self._below.cache
        self.scheduler.worth.needed(layer, experts)
        resident = [expert for expert in experts if cache.is_resident(layer, expert)]
        if len(resident) == len(experts):
            return Share([], resident)
        works = {e: self._work(layer, e, tokens) for e in experts}
        movable = [e for e in experts if e not in resident and self._in_reach(layer, e)]
        if not movable:
            return Share([], list(experts))
        chosen = self.scheduler.split(
            [Needed(ExpertKey(layer, expert), works[expert]) for expert in movable],
            [works[expert] for expert in resident],
        )
        self._waits_for_host = True
        host = [m.expert for m in chosen.cpu]
        if host:
            below.acquire(layer, host)
            cache.pass_over(layer, host)
        others = [e for e in experts if e not in resident and e not in movable]
        return Share(host, [*resident, *others, *(m.expert for m in chosen.link)])

    def admitted(self, layer: int, acquired: Acquisition) -> None:
        """The device's tier has admitted experts, whose worth is observed from now on."""
        for expert, victim in zip(reversed(acquired.load), reversed(acquired.victims), strict=False):
            self.scheduler.worth.admitted(layer, expert, victim)

    def began(self) -> None:
        """All work that the device can do now has been launched: the CPU's share begins."""
        if self._waits_for_host:
            self._waits_for_host = False
            self.scheduler.began()

    def computed(
        self, layer: int, experts: Sequence[int], tokens: Callable[[int], int], start: float
    ) -> None:
        """The CPU computed these experts from `start`, in the scheduler's clock, until now."""
        work = [self._work(layer, expert, tokens) for expert in experts]
        self.scheduler.computed(work, start, self.scheduler.timeline.clock())

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """Unpin these experts in RAM, since the CPU no longer reads them."""
        self._below.cache.release(layer, experts)

    def promote(
        self, layer: int, host: Sequence[int], tokens: Callable[[int], int], keep: Sequence[int]
    ) -> None:
        """Start to copy one of the host's experts to a slot, if the link is idle and the slot is worth it.

        It is the one with the most tokens. No expert in `keep` is evicted for it.
        """
        if self._copies.busy:
            return
        expert = max(
            (e for e in host if self._tier.cache.slot_of(layer, e) is None), key=tokens, default=None
        )
        if expert is None:
            return
        work = self._work(layer, expert, tokens)
        if not self._tier.cache.has_room(layer, expert) and not self.scheduler.wants_promotion(work):
            return
        made = self._tier.cache.promote(layer, expert, keep)
        if made is not None:
            if made.victim is not None:
                self.scheduler.worth.admitted(layer, expert, made.victim)
            self._tier.bring(ExpertKey(layer, expert), made.slot, PROMOTION)

    def _work(self, layer: int, expert: int, tokens: Callable[[int], int]) -> Work:
        layout = self._layouts[layer][expert]
        return Work(layout.nbytes, tokens(expert), layout.format)

    def _in_reach(self, layer: int, expert: int) -> bool:
        """Whether the CPU can read a missing expert in RAM, now and as long as it takes."""
        if not self._below.cache.is_resident(layer, expert):
            return False
        under_way = self._tier.cache.slot_of(layer, expert) is not None
        return not under_way or self._tier.copying(ExpertKey(layer, expert))
