"""The one door to experts: a layer asks for the experts it needs and gets them as they become readable."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from moe_local.cache.keys import ExpertKey
from moe_local.cache.stats import BytesMoved, RouterLoad, StallSeconds, Stats
from moe_local.offload.device import Waited
from moe_local.offload.interrupt import check as check_interrupt
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.tiers import CopySource, Tier
from moe_local.offload.transfer import FileSource

WAIT_SECONDS = 0.1
"""Longest wait between two looks at pending interrupts."""


class Lease(NamedTuple):
    """An expert that kernels may read until the consumer of `serve` asks for the next group."""

    expert: int
    buffer: torch.Tensor
    """uint8, the slot; the first `layout.nbytes` are the expert's."""
    layout: Layout


class Tally(NamedTuple):
    """What a token's record is the difference of."""

    stall_s: float
    hits: int
    misses: int
    bytes_h2d: int
    bytes_disk: int


class ExpertStore:
    """Serves the experts of one model from its fastest tier.

    Used by one thread at a time. `layouts[layer][expert]` says what lies in each expert's buffer. A
    leased slot is pinned: nothing is loaded over it before the lease has ended and, on a device, before
    the kernels that were given it have run.
    """

    def __init__(
        self,
        tier: Tier,
        layouts: Sequence[Sequence[Layout]],
        routed: RouterLoad,
        *,
        disk: FileSource,
        below: Tier | None = None,
    ) -> None:
        """`tier` is the fastest, `below` the one that it loads from, if any; `disk` the last source of all."""
        self.tier = tier
        self.layouts = layouts
        self.routed = routed
        self.tokens = 0
        """Tokens generated, counted by whoever generates."""
        self.below = below
        self._disk = disk
        self._stall = dict.fromkeys(("demand", "late_prefetch", "disk", "cpu", "sync"), 0.0)
        self._waits: list[tuple[str, Waited]] = []
        self._leased: dict[ExpertKey, int] = {}

    def serve(
        self, layer: int, experts: Sequence[int], requested: Callable[[], None] | None = None
    ) -> Iterator[list[Lease]]:
        """Yield the experts (distinct, in the router's order) in groups, each as soon as it is readable.

        Resident ones come first. Where there are more experts than slots they come in waves: a slot is
        loaded again as soon as its expert has been consumed. `requested` is called once, after the misses
        of the first wave were requested: the place for prefetches. Close the iterator if it is not run to
        its end. Raises TransferError if an expert cannot be brought.
        """
        tier, cache = self.tier, self.tier.cache
        tier.poll()
        if cache.loading(layer):
            self._drop_unneeded(layer, experts)
        todo = deque(experts)
        if len(experts) > cache.slots(layer):  # those that are here must be used before they are evicted
            todo = deque(sorted(experts, key=lambda expert: cache.slot_of(layer, expert) is None))
        waiting: list[int] = []
        late: set[int] = set()
        ready: deque[int] = deque()
        try:
            while todo or waiting or ready:
                if todo:
                    self._admit(layer, todo, waiting, late, ready)
                if requested is not None:
                    requested()
                    requested = None
                if waiting:
                    self._collect(layer, waiting, late, ready)
                if not ready:
                    self._wait(layer, waiting, late)
                    continue
                # With more to come, one at a time: the slot that it frees loads while the next computes.
                group = [ready.popleft()] if todo else list(ready)
                if not todo:
                    ready.clear()
                try:
                    yield [self._lease(layer, expert) for expert in group]
                finally:
                    self._release(layer, group)
        finally:
            held = [expert for expert in (*ready, *waiting) if cache.pins(layer, expert)]
            cache.release(layer, held)

    def slots(self, layer: int) -> int:
        """Experts that the fastest tier holds of this layer."""
        return self.tier.cache.slots(layer)

    def num_experts(self, layer: int) -> int:
        return len(self.layouts[layer])

    def prefetch(self, layer: int, experts: Sequence[int], *, distance: int, budget_bytes: int) -> None:
        """Request absent experts of a later layer, likeliest first, behind all demand loads.

        Never evicts one of `experts`. Stops where loads under way would exceed `budget_bytes`.
        """
        tier, cache = self.tier, self.tier.cache
        left = budget_bytes - tier.bytes_in_flight
        for expert in experts:
            if cache.slot_of(layer, expert) is not None:
                continue
            left -= self.layouts[layer][expert].nbytes
            if left < 0:
                return
            slot = cache.reserve(layer, expert, keep=experts)
            if slot is None:
                return
            tier.bring(ExpertKey(layer, expert), slot, distance)

    def add_stall(self, cause: str, seconds: float) -> None:
        """Charge a wait to a cause, a field of StallSeconds."""
        self._stall[cause] += seconds

    def tally(self) -> Tally:
        """Counts since load, for the record of each token: cheaper than `snapshot`."""
        self._settle_waits()
        counters, source = self.tier.cache.stats, self.tier.source
        copied = source.bytes_copied if isinstance(source, CopySource) else 0
        return Tally(
            sum(self._stall.values()), counters.hits, counters.misses, copied, self._disk.bytes_read
        )

    def snapshot(self) -> Stats:
        """Counts since load. On a device this waits for the timing of stalls still under way."""
        self._settle_waits()
        source = self.tier.source
        copied = source.bytes_copied if isinstance(source, CopySource) else 0
        return self.tier.cache.stats.snapshot(
            bytes=BytesMoved(h2d=copied, disk=self._disk.bytes_read),
            stall=StallSeconds(**self._stall),
            tokens=self.tokens,
            routed=self.routed.snapshot(),
        )

    def close(self) -> None:
        """Stop loads and free the slots. Idempotent."""
        self.tier.close()
        if self.below is not None:
            self.below.close()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless no lease is left over and the tier agrees with its loads."""
        self.tier.check_integrity()
        if self.below is not None:
            self.below.check_integrity()
        if self._leased:
            raise RuntimeError(f"leases were not given back: {self._leased}")

    def _admit(
        self, layer: int, todo: deque[int], waiting: list[int], late: set[int], ready: deque[int]
    ) -> None:
        """Pin as many of `todo` as there is room for, and start the loads of those that are absent."""
        tier, cache = self.tier, self.tier.cache
        wave = list(todo)[: cache.slots(layer)]
        while wave and cache.shortage(layer, wave):
            wave.pop()
        if not wave:
            return
        for _ in wave:
            todo.popleft()
        acquired = cache.acquire(layer, wave)
        if not acquired.load and not acquired.joined:
            ready.extend(wave)
            return
        slot_of = dict(zip(wave, acquired.slots, strict=True))
        for expert in acquired.load:
            tier.bring(ExpertKey(layer, expert), slot_of[expert], 0)
        for expert in acquired.joined:
            tier.promote(ExpertKey(layer, expert))
            late.add(expert)
        absent = {*acquired.load, *acquired.joined}
        waiting.extend(expert for expert in wave if expert in absent)
        ready.extend(expert for expert in wave if expert not in absent)

    def _collect(self, layer: int, waiting: list[int], late: set[int], ready: deque[int]) -> None:
        """Move experts that became readable from `waiting` to `ready`."""
        for expert in tuple(waiting):
            key = ExpertKey(layer, expert)
            there, waited = self.tier.claim(key)
            if there:
                waiting.remove(expert)
                ready.append(expert)
                if waited is not None:
                    self._waits.append(("late_prefetch" if expert in late else "demand", waited))

    def _wait(self, layer: int, waiting: list[int], late: set[int]) -> None:
        """Block until something moves, at most WAIT_SECONDS; charge the time to what is waited for."""
        check_interrupt()
        cause = "demand"
        if waiting:
            cause = "late_prefetch" if waiting[0] in late else self.tier.cause(ExpertKey(layer, waiting[0]))
        start = time.perf_counter()
        self.tier.source.wait(WAIT_SECONDS)
        self.tier.poll()
        self._stall[cause] += time.perf_counter() - start

    def _settle_waits(self) -> None:
        """Charge the waits of the device's stream, which are over once a token has come back from it."""
        for cause, waited in self._waits:
            self._stall[cause] += waited.seconds()
        self._waits.clear()

    def _drop_unneeded(self, layer: int, experts: Sequence[int]) -> None:
        """Cancel prefetches for this layer that guessed wrong: the layer is being served now."""
        for expert in self.tier.cache.loading(layer):
            if expert not in experts:
                self.tier.cancel(ExpertKey(layer, expert))
        self.tier.poll()

    def _lease(self, layer: int, expert: int) -> Lease:
        slot = self.tier.cache.slot_of(layer, expert)
        if slot is None:
            raise RuntimeError(f"expert {expert} of layer {layer} is pinned without a slot")
        key = ExpertKey(layer, expert)
        self._leased[key] = self._leased.get(key, 0) + 1
        return Lease(expert, self.tier.arena.buffer(layer, slot), self.layouts[layer][expert])

    def _release(self, layer: int, group: Sequence[int]) -> None:
        tier = self.tier
        if tier.device is not None and isinstance(tier.source, CopySource):
            slots = [slot for expert in group if (slot := tier.cache.slot_of(layer, expert)) is not None]
            tier.source.read_by(layer, slots, tier.device.record())
        for expert in group:
            del self._leased[ExpertKey(layer, expert)]
        tier.cache.release(layer, group)
