"""The only way to get experts: a layer asks for those it needs and gets each as it becomes readable."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence

from moe_local.cache.keys import ExpertKey
from moe_local.cache.stats import BytesMoved, RouterLoad, Stats
from moe_local.offload.gpu.custody import Custody, HostAlone
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.schedule.host_share import HostShare
from moe_local.offload.schedule.scheduler import MissScheduler
from moe_local.offload.store.arrivals import Arrivals
from moe_local.offload.store.leases import Lease, Serving, Tally
from moe_local.offload.store.prefill import PrefillStream
from moe_local.offload.store.stalls import StallAccount
from moe_local.offload.system.interrupt import check as check_interrupt
from moe_local.offload.tiers.copies import CopySource
from moe_local.offload.tiers.tiers import Tier
from moe_local.offload.tiers.transfer import DEMAND, FileSource


class ExpertStore:
    """Serves the experts of one model from its fastest tier.

    Used by one thread at a time. `layouts[layer][expert]` describes the contents of each expert's buffer. A
    leased slot is pinned: nothing is loaded over it before the lease has ended and, on a device, before the
    kernels that read it have finished.
    """

    def __init__(
        self,
        tier: Tier,
        layouts: Sequence[Sequence[Layout]],
        routed: RouterLoad,
        *,
        disk: FileSource,
        below: Tier | None = None,
        scheduler: MissScheduler | None = None,
    ) -> None:
        """`tier` is the fastest tier, `below` the one it loads from, if any, `disk` the source of the lowest.
        `scheduler` decides which misses the CPU computes; without one every miss is brought to `tier`.

        Every layer needs at least one slot in each tier.
        """
        self.tiers = (tier,) if below is None else (tier, below)
        """All tiers, the fastest first."""
        if not all(each.cache.slots(layer) for each in self.tiers for layer in range(len(layouts))):
            raise ValueError("a layer without any slot cannot be served")
        self.tier = tier
        self.layouts = layouts
        self.kinds = [list({id(layout): layout for layout in layer}.values()) for layer in layouts]
        """The different layouts of each layer."""
        self.routed = routed
        self.tokens = 0
        """Tokens generated so far; the engine counts them."""
        self.below = below
        self._copies = tier.source if isinstance(tier.source, CopySource) else None
        self.host: HostShare | None = None
        """The CPU's share of misses on a device; None: the CPU computes none."""
        self.custody: Custody = HostAlone()
        """Whether a device may also change which expert is in which slot of `tier`; see gpu/custody.py."""
        self.stalls = StallAccount()
        self._arrivals = Arrivals(tier, self.stalls)
        self.prefill: PrefillStream | None = None
        """Serves steps of many tokens; None: they are served like others, in waves."""
        if tier.cache.staging.slots >= 2:
            self.prefill = PrefillStream(tier, layouts, routed.top_k(0), self._arrivals)
        if scheduler is not None and below is not None and self._copies is not None:
            self.host = HostShare(tier, below, self._copies, layouts, scheduler)
        self._disk = disk
        self.bytes_uncounted = 0
        """Bytes from disk that do not count, since a trial read them; see uncounted.py."""
        self._leased = 0

    def serve(
        self,
        layer: int,
        experts: Sequence[int],
        requested: Callable[[], None] | None = None,
        tokens: Callable[[int], int] | None = None,
        recent: Sequence[int] | None = None,
    ) -> Generator[list[Lease], None, None]:
        """Yield the experts (distinct, in the router's order) in groups, each as soon as it is readable.

        Resident experts come first. If there are more experts than slots, they come in waves: a slot is
        reloaded as soon as its expert has been consumed. `requested` is called once, after the loads of the
        first wave's misses were started, which is the moment for prefetches. Close the iterator if it is not
        exhausted. One iterator per layer may be open. Raises TransferError if an expert cannot be loaded.

        With `tokens` (expert -> how many tokens it has), some groups may be for the CPU (Lease.on_host, never
        mixed with others): their experts stay in RAM. These come after the device has been given everything
        that is readable, so that its kernels and copies run meanwhile.

        With `recent`, what PrefillStream.recent returned, it is a long step, which the PrefillStream serves.
        """
        self.custody.release()
        self.tier.poll()
        if recent is None:
            self._drop_unneeded(layer, experts)
            if self.tier.cache.has_all(layer, experts):
                if self.host is not None and tokens is not None:
                    self.host.scheduler.worth.needed(layer, experts)
                yield from self._serve_residents(layer, experts, requested)
                return
        serving = Serving(layer, experts, tokens, todo=list(experts))
        if self.host is not None and tokens is not None:
            serving.host, serving.todo = self.host.divide(layer, experts, tokens)
        try:
            if recent is not None and self.prefill is not None:
                yield from self._serve_long(serving, self.prefill, recent, requested)
            else:
                yield from self._serve_step(serving, requested)
        finally:
            if self.host is not None:
                self.host.began()
                self.host.release(layer, serving.host)

    def _serve_step(
        self, serving: Serving, requested: Callable[[], None] | None
    ) -> Generator[list[Lease], None, None]:
        """`serve` if some experts are absent, or the CPU computes some."""
        cache, layer = self.tier.cache, serving.layer
        serving.waves = not cache.fits(layer, serving.todo)
        if serving.waves:
            self._present_first(serving)
        first = True
        try:
            while serving.todo or serving.waiting or serving.ready or serving.host:
                if serving.todo:
                    self._admit(serving)
                if first:
                    first = False
                    if requested is not None:
                        requested()
                    if self.host is not None and serving.tokens is not None:  # the link may be idle now
                        self.host.promote(layer, serving.host, serving.tokens, keep=serving.experts)
                # Give a device the experts that are readable before its stream waits for more.
                if serving.waiting and not (serving.ready and self._copies is not None):
                    self._arrivals.collect(serving)
                if not serving.ready:
                    if serving.host:
                        yield from self._lend(serving)
                    else:
                        self._wait(serving)
                    continue
                # With more to load, one at a time: the slot that it frees reloads while the next is computed.
                group = serving.ready[:1] if serving.todo else serving.ready
                serving.ready = serving.ready[len(group) :]
                yield from self._hand_out(serving, group)
        finally:
            held = (*serving.used, *serving.ready, *serving.waiting)
            cache.release(layer, [expert for expert in held if cache.pins(layer, expert)])

    def _hand_out(self, serving: Serving, group: list[int]) -> Generator[list[Lease], None, None]:
        """Yield readable experts. If all of the step fit, they stay pinned while the others are loaded."""
        layer, slots = serving.layer, [serving.slots[expert] for expert in group]
        self._leased += len(slots)
        try:
            yield [self._lease(layer, expert, slot) for expert, slot in zip(group, slots, strict=True)]
        finally:
            if serving.waves or not serving.todo:
                self.tier.cache.release(layer, group)
            else:
                serving.used += group
            self._end_leases(layer, slots)

    def _serve_long(
        self,
        serving: Serving,
        prefill: PrefillStream,
        recent: Sequence[int],
        requested: Callable[[], None] | None,
    ) -> Generator[list[Lease], None, None]:
        """`serve` for a long step: the prefill stream serves all experts that the CPU does not compute."""
        needed, serving.todo = serving.todo, []

        def meanwhile() -> Generator[list[Lease], None, None] | None:
            return self._lend(serving) if serving.host else None

        yield from prefill.serve(serving.layer, needed, recent, requested, meanwhile)
        if (left := meanwhile()) is not None:
            yield from left

    def _serve_residents(
        self, layer: int, experts: Sequence[int], requested: Callable[[], None] | None
    ) -> Generator[list[Lease], None, None]:
        """`serve` if all experts are resident, as in most steps of most models."""
        arena, layouts = self.tier.arena, self.layouts[layer]
        slots = self.tier.cache.acquire(layer, experts).slots
        self._leased += len(slots)
        try:
            if requested is not None:
                requested()
            pairs = zip(experts, slots, strict=True)
            yield [Lease(expert, arena.buffer(layer, slot), layouts[expert]) for expert, slot in pairs]
        finally:
            self.tier.cache.release(layer, experts)
            self._end_leases(layer, slots)

    def _lend(self, serving: Serving) -> Generator[list[Lease], None, None]:
        """Yield the CPU's experts: all at once, or one by one while loads are started or waited for."""
        assert self.host is not None
        assert self.below is not None
        assert serving.tokens is not None
        check_interrupt()
        self.host.began()
        layer, cache = serving.layer, self.below.cache
        group = serving.host[:1] if serving.todo or serving.waiting else serving.host[:]
        leases = []
        for expert in group:
            slot = cache.slot_of(layer, expert)
            assert slot is not None
            buffer = self.below.arena.buffer(layer, slot)
            leases.append(Lease(expert, buffer, self.layouts[layer][expert], on_host=True))
        self._leased += len(group)
        start = self.host.scheduler.timeline.clock()
        try:
            yield leases
            self.host.computed(layer, group, serving.tokens, start)
        finally:
            del serving.host[: len(group)]
            self.host.release(layer, group)
            self._leased -= len(group)
        self.tier.poll()

    def slots(self, layer: int) -> int:
        """How many slots the fastest tier has for this layer."""
        return self.tier.cache.slots(layer)

    def num_experts(self, layer: int) -> int:
        return len(self.layouts[layer])

    def prefetch(self, layer: int, experts: Sequence[int], *, distance: int, budget_bytes: int) -> None:
        """Request absent experts of a later layer, likeliest first, behind all demand loads.

        Never evicts one of `experts`. Stops before loads in flight would exceed `budget_bytes`. In a long
        step nothing is evicted: the prefill stream reads them ahead as far as its ring has room.
        """
        if self.prefill is not None and self.prefill.serving:
            self.prefill.guess(layer, experts)
            return
        tier, cache = self.tier, self.tier.cache
        left = budget_bytes - tier.bytes_in_flight
        for expert in experts:
            if cache.slot_of(layer, expert) is not None:
                continue
            nbytes = self.layouts[layer][expert].nbytes
            if nbytes > left:
                return
            slot = cache.reserve(layer, expert, keep=experts)
            if slot is not None:
                left -= nbytes
                tier.bring(ExpertKey(layer, expert), slot, distance)
            elif not cache.several_sizes(layer):
                return

    @property
    def bytes_read(self) -> int:
        """Bytes from disk since load."""
        return self._disk.bytes_read - self.bytes_uncounted

    def tally(self) -> Tally:
        """Counts since the model was loaded, for the record of each token: cheaper than `snapshot`."""
        self.custody.settle_counts()
        counters = self.tier.cache.stats
        copied = self._copies.bytes_copied if self._copies else 0
        return Tally(self.stalls.total(), counters.hits, counters.misses, copied, self.bytes_read)

    def snapshot(self, *, routed: bool = True) -> Stats:
        """Counts since load. On a device this waits for the timing of stalls still under way.

        `routed=False` leaves the large table of the router's choices out.
        """
        self.custody.catch_up()
        copied = self._copies.bytes_copied if self._copies else 0
        return self.tier.cache.stats.snapshot(
            bytes=BytesMoved(h2d=copied, disk=self.bytes_read),
            stall=self.stalls.by_cause(),
            tokens=self.tokens,
            routed=self.routed.snapshot() if routed else None,
        )

    def empty(self, policy: str | None = None) -> None:
        """Evict every expert, except from a tier that has a slot for each: the start of a measurement.

        `policy`: the eviction policy of the fastest tier from now on. Blocks; nothing may be leased.
        """
        self.custody.release()
        for tier in self.tiers:
            if any(tier.cache.slots(layer) < len(experts) for layer, experts in enumerate(self.layouts)):
                tier.empty(policy if tier is self.tier else None)

    def close(self) -> None:
        """Stop loads and free the slots, even if the device no longer responds. Idempotent."""
        settle, self.routed.settle = self.routed.settle, None  # it may hold memory of the device
        with contextlib.suppress(RuntimeError):
            self.custody.release()
            if settle is not None:
                settle()
        self.custody = HostAlone()
        with contextlib.ExitStack() as undo:  # the fastest first; the other even if that raises
            for tier in reversed(self.tiers):
                undo.callback(tier.close)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless no lease is left over and the tier agrees with its loads."""
        self.custody.check_integrity()
        for tier in self.tiers:
            tier.check_integrity()
        if self.prefill is not None:
            self.prefill.check_integrity()
        if self._leased:
            raise RuntimeError(f"{self._leased} leases were not given back")

    def _present_first(self, serving: Serving) -> None:
        """Reorder `todo` so that resident experts are used before their slots are taken for absent ones."""
        cache, layer = self.tier.cache, serving.layer
        serving.todo.sort(key=lambda expert: cache.slot_of(layer, expert) is None)

    def _admit(self, serving: Serving) -> None:
        """Pin as many experts of `todo` as there are slots for, and start loads of the absent ones."""
        tier, cache, layer = self.tier, self.tier.cache, serving.layer
        wave = serving.todo[: cache.slots(layer)]
        if cache.shortage(layer, wave):
            self._present_first(serving)
            wave = serving.todo[: len(wave)]
            while wave and cache.shortage(layer, wave):
                wave.pop()
            if not wave:
                return
        acquired = cache.acquire(layer, wave)
        serving.todo = serving.todo[len(wave) :]
        serving.slots.update(zip(wave, acquired.slots, strict=True))
        if not acquired.load and not acquired.joined:
            serving.ready += wave
            return
        if self.host is not None:
            self.host.admitted(layer, acquired)
        for expert in acquired.load:
            tier.bring(ExpertKey(layer, expert), serving.slots[expert], DEMAND)
        for expert in acquired.joined:
            tier.promote(ExpertKey(layer, expert))
        serving.late.update(acquired.joined)
        absent = {*acquired.load, *acquired.joined}
        serving.waiting += [expert for expert in wave if expert in absent]
        serving.ready += [expert for expert in wave if expert not in absent]

    def _wait(self, serving: Serving) -> None:
        """Block until some load makes progress, at most LOOK_SECONDS."""
        check_interrupt()
        layer, cache = serving.layer, self.tier.cache
        if serving.waiting or cache.loading(layer):
            self._arrivals.wait(serving)
        elif serving.used:  # a used expert is in the only slot that the next one would fit
            cache.release(layer, serving.used)
            serving.used, serving.waves = [], True
        else:
            raise RuntimeError(f"every slot of layer {layer} is leased to another iterator")

    def _drop_unneeded(self, layer: int, experts: Sequence[int]) -> None:
        """Drop what a long step left in the ring, and cancel wrong prefetches for this layer."""
        if self.tier.cache.staging.used and self.prefill is not None:
            self.prefill.clear(layer, experts)
        if loading := self.tier.cache.loading(layer):
            for expert in loading:
                if expert not in experts:
                    self.tier.cancel(ExpertKey(layer, expert))
            self.tier.poll()

    def _lease(self, layer: int, expert: int, slot: int) -> Lease:
        return Lease(expert, self.tier.arena.buffer(layer, slot), self.layouts[layer][expert])

    def _end_leases(self, layer: int, slots: Sequence[int]) -> None:
        """Call it last: recording an event on a lost device raises."""
        self._leased -= len(slots)
        if self._copies is not None:
            self._copies.read_by(layer, slots)
