"""The part of a layer's misses that the CPU computes, in the store's terms: tiers, pins and promotions."""

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
"""Priority of a promotion's copy: behind everything."""


class Share(NamedTuple):
    """A step's experts, divided."""

    host: list[int]
    """Computed by the CPU; pinned in RAM until they are released."""
    device: list[int]
    """All others, in the order in which they are best asked for."""


class HostShare:
    """Divides a layer's experts between host and device, and promotes what the CPU had to compute.

    The CPU is only given experts whose bytes are in RAM. One that is on disk, or whose prefetch waits for
    the disk, takes the way to the device as ever: the read is most of what it costs.
    """

    def __init__(
        self,
        tier: Tier,
        below: Tier,
        copies: CopySource,
        layouts: Sequence[Sequence[Layout]],
        scheduler: MissScheduler,
    ) -> None:
        """`tier` is the device's, filled by `copies` from `below` in RAM; `scheduler` is told of copies."""
        self.scheduler = scheduler
        self._tier = tier
        self._below = below
        self._copies = copies
        self._layouts = layouts
        self._waits_for_host = False
        copies.watch = scheduler

    def divide(self, layer: int, experts: Sequence[int], tokens: Callable[[int], int]) -> Share:
        """Decide about a step's experts, of which each has so many tokens.

        Counts the host's as misses and pins them in RAM.
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
        """The device's tier has admitted experts."""
        for expert, victim in zip(reversed(acquired.load), reversed(acquired.victims), strict=False):
            self.scheduler.worth.admitted(layer, expert, victim)

    def began(self) -> None:
        """The device has been given all that can be given to it now: the host's turn."""
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
        """The CPU no longer reads these."""
        self._below.cache.release(layer, experts)

    def promote(
        self, layer: int, host: Sequence[int], tokens: Callable[[int], int], keep: Sequence[int]
    ) -> None:
        """Start to copy one of the host's experts to a slot, if the link is idle and it is worth that.

        The one with the most tokens, at the cost of none of `keep`.
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
        """Whether the CPU could read a missing expert now and for as long as it likes."""
        if not self._below.cache.is_resident(layer, expert):
            return False
        under_way = self._tier.cache.slot_of(layer, expert) is not None
        return not under_way or self._tier.copying(ExpertKey(layer, expert))
