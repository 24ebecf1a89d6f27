"""Serving long steps: a prompt's experts stream through a few slots that belong to no layer."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moe_local.cache.keys import ExpertKey
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.store.arrivals import Arrivals
from moe_local.offload.store.leases import Lease
from moe_local.offload.system.interrupt import check as check_interrupt
from moe_local.offload.tiers.copies import CopySource
from moe_local.offload.tiers.tiers import Tier
from moe_local.offload.tiers.transfer import DEMAND

RECENT = 32
"""How many tokens at a prompt's end have their experts admitted to the cache. In replays of recorded routes
decoding hits most if all slots hold these: more tokens gain nothing, fewer cost up to 0.1 of the hit rate
(docs/log.md)."""

WHOLE = 0.75
"""If a step uses at least this share of a layer's experts, all of the next layer's are read ahead: the link
would idle otherwise, and loads that turn out not to be needed are cancelled."""

SKEW = 8
"""Until a step's first layer has run, this many tokens are assumed to use as many experts as one token that
chooses at random would, since routers favour some experts. Recorded prompts of 28 and 92 tokens used as many
as 1 in 2.4 and 1 in 5.4 of their tokens would at random."""

AHEAD = 1
"""Priority of loads for the next layer."""


@dataclass(slots=True)
class _Pass:
    """One layer's experts during a long step. Each moves from list to list until it is handed out."""

    layer: int
    recent: Sequence[int]
    """Experts to be admitted to slots of the layer, the most recently needed last."""
    passing: deque[int] = field(default_factory=deque)
    """Absent, to be staged."""
    admitted: deque[int] = field(default_factory=deque)
    """Absent, to be loaded into a slot of the layer; another expert may be evicted for it."""
    waiting: list[int] = field(default_factory=list)
    """Pinned, not readable yet."""
    here: deque[int] = field(default_factory=deque)
    """Pinned, resident from the beginning, not handed out yet."""
    ready: deque[int] = field(default_factory=deque)
    """Pinned, arrived since then, not handed out yet."""
    victims: int = 0
    """How many experts, the first of `here`, will be evicted for those admitted."""
    late: set[int] = field(default_factory=set)
    """Experts whose load was already in flight when the layer asked for them."""

    @property
    def asked(self) -> bool:
        """Whether all loads have been started."""
        return not self.passing and not self.admitted

    @property
    def over(self) -> bool:
        return self.asked and not (self.waiting or self.here or self.ready)


class PrefillStream:
    """Serves steps of many tokens from a tier with a staging ring, beside the ExpertStore that owns it.

    Such a step needs most experts of a layer, each once. Resident ones are computed from their slots. The
    others pass through the ring: some load while others are computed. As ring slots come free, experts of the
    next layer follow: all of them if this layer's tokens use nearly all experts, else those that the
    prefetcher names. An expert that only passes through evicts nothing, nor does the eviction order change.
    The experts of the step's last tokens are the exception, since decoding starts with them: they are
    admitted, as many as the layer has slots, and touched in the order in which they were last needed, as if
    these tokens had been decoded.

    Used by the engine's thread alone.
    """

    def __init__(
        self,
        tier: Tier,
        layouts: Sequence[Sequence[Layout]],
        top_k: int,
        arrivals: Arrivals,
    ) -> None:
        """`tier` must have a ring of two slots or more. A token uses `top_k` experts of the first layer."""
        if tier.cache.staging.slots < 2:
            raise ValueError(f"{tier.cache.staging.slots} staging slots; one loads while another is read")
        self.chunk = 0
        """Tokens of the longest steps; after one of this length, another of the prompt probably follows."""
        self.ahead = True
        """Whether to read experts ahead of the layer that needs them."""
        self._tier = tier
        self._layouts = layouts
        self._top_k = top_k
        self._arrivals = arrivals
        self._copies = tier.source if isinstance(tier.source, CopySource) else None
        self._most = tier.cache.staging.slots // 2
        self._rows, self._length = 1, 1
        self._share = 0.0
        """Share of a layer's experts that the step's tokens use: an estimate, then that of the last layer."""
        self._guesses: dict[int, list[int]] = {}
        self._serving = False
        self._leased = 0

    @property
    def serving(self) -> bool:
        """Whether a step is being served here at this moment."""
        return self._serving

    def begin(self, rows: int, length: int) -> None:
        """Call before a forward of `rows` sequences with `length` tokens each. Reads ahead for layer 0."""
        self._rows, self._length = rows, length
        self._guesses.clear()
        if length > 1:
            tokens, used = rows * length / SKEW, self._top_k / len(self._layouts[0])
            self._share = 1 - (1 - used) ** tokens
            self._tier.poll()
            self._read_ahead(0)

    def recent(self, layer: int, ids: Sequence[int], distinct: int) -> list[int] | None:
        """The experts that the step's last tokens use, the most recently used last.

        `ids` are the router's choices, token by token. None if the step is not to be served here: the layer
        has a slot for every expert, the step is decoding, or it is so short that the slots hold all it uses.
        """
        cache = self._tier.cache
        slots, rows, length = cache.slots(layer), self._rows, self._length
        if length == 1 or slots >= len(self._layouts[layer]) or len(ids) % (rows * length):
            return None
        if length <= RECENT and distinct <= slots:
            return None
        self._share = distinct / len(self._layouts[layer])
        width = len(ids) // rows
        last = min(length, max(1, RECENT // rows)) * (width // length)
        ends = [ids[end - last : end] for end in range(width, len(ids) + 1, width)]
        needed = dict.fromkeys(itertools.chain.from_iterable(zip(*map(reversed, ends), strict=True)))
        return cache.at_once(layer, list(needed))[::-1]

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Take note of the experts that a later layer will probably need, likeliest first."""
        self._guesses[layer] = list(experts)

    def clear(self, layer: int, experts: Sequence[int]) -> None:
        """Drop everything staged except these experts, and cancel loads to this layer of any others."""
        cache = self._tier.cache
        for key in cache.staging.clear(layer, experts):
            self._tier.cancel(key)
        for expert in cache.loading(layer):
            if expert not in experts:
                self._tier.cancel(ExpertKey(layer, expert))
        self._tier.poll()

    def serve(
        self,
        layer: int,
        experts: Sequence[int],
        recent: Sequence[int],
        requested: Callable[[], None] | None,
        meanwhile: Callable[[], Generator[list[Lease], None, None] | None],
    ) -> Generator[list[Lease], None, None]:
        """ExpertStore.serve for one layer of a long step; `recent` is what the method of that name returned.

        `meanwhile` is called when nothing is readable, and may return other groups to yield first. Raises
        TransferError.
        """
        self._tier.poll()
        self.clear(layer, experts)
        state = self._hold(layer, experts, recent)
        self._serving = True
        try:
            while not state.over:
                check_interrupt()
                self._ask(state)
                if requested is not None:
                    requested()
                    requested = None
                    self._ask(state)  # the guesses that `requested` added, too
                if state.waiting and not (self._copies is not None and (state.here or state.ready)):
                    self._arrivals.collect(state, None if self._copies is None else self._most)
                group = self._next_group(state)
                if group:
                    yield from self._lend(layer, group, recent)
                elif state.waiting or not state.asked:
                    other = meanwhile()
                    if other is None:
                        self._wait(state)
                    else:
                        yield from other
            self._tier.cache.staging.touch(layer, recent)
            self._read_on(layer)
        finally:
            self._serving = False
            cache, held = self._tier.cache, (*state.here, *state.ready, *state.waiting)
            cache.release(layer, [expert for expert in held if cache.pins(layer, expert)])

    def check_integrity(self) -> None:
        """Raise RuntimeError unless no lease is left over."""
        if self._leased:
            raise RuntimeError(f"{self._leased} leases of a long step were not given back")

    def _hold(self, layer: int, experts: Sequence[int], recent: Sequence[int]) -> _Pass:
        """Pin the experts that are resident, staged or in flight, and queue the others."""
        cache = self._tier.cache
        held = cache.staging.hold(layer, experts)
        wanted = set(held.absent).intersection(recent)
        state = _Pass(layer, recent, waiting=held.joined, late=set(held.joined))
        state.passing.extend(expert for expert in held.absent if expert not in wanted)
        state.admitted.extend(expert for expert in recent if expert in wanted)
        for expert in held.joined:
            self._tier.promote(ExpertKey(layer, expert))
        to_admit = [e for e in recent if e in wanted or cache.staging.has(layer, e)]
        leaving = cache.staging.next_victims(layer, recent, to_admit)
        first = [expert for expert in leaving if expert in held.ready]
        state.victims = len(first)
        state.here.extend([*first, *(expert for expert in held.ready if expert not in first)])
        return state

    def _ask(self, state: _Pass) -> None:
        """Start as many loads as there are slots for: this layer's, then the next one's."""
        cache, layer = self._tier.cache, state.layer
        for expert in tuple(state.admitted):
            made = cache.promote(layer, expert, state.recent)
            if made is not None:
                state.admitted.remove(expert)
                self._bring(state, expert, made.slot)
                cache.staging.pin(layer, expert)
            elif not cache.several_sizes(layer):
                break
        while state.passing:
            slot = cache.staging.stage(layer, state.passing[0])
            if slot is None:
                break
            self._bring(state, state.passing.popleft(), slot)
        if not state.passing:
            self._read_on(layer)

    def _bring(self, state: _Pass, expert: int, slot: int) -> None:
        self._tier.bring(ExpertKey(state.layer, expert), slot, DEMAND)
        state.waiting.append(expert)

    def _read_on(self, layer: int) -> None:
        """Read ahead for the layer that is computed after this one."""
        if layer + 1 < len(self._layouts):
            self._read_ahead(layer + 1)
        elif self._rows == 1 and self._length == self.chunk:
            self._read_ahead(0)

    def _read_ahead(self, layer: int) -> None:
        """Load absent experts of a later layer into free slots of the ring."""
        if not self.ahead:
            return
        cache = self._tier.cache
        whole = range(len(self._layouts[layer])) if self._share >= WHOLE else ()
        wanted: Iterable[int] = whole or self._guesses.get(layer, ())
        for expert in wanted:
            if cache.slot_of(layer, expert) is None:
                slot = cache.staging.stage(layer, expert, ahead=True)
                if slot is None:
                    return
                self._tier.bring(ExpertKey(layer, expert), slot, AHEAD)

    def _next_group(self, state: _Pass) -> list[int]:
        """The experts to compute next: a few, so that their slots are reloaded while others are computed.

        Residents that will be evicted come first. On the CPU, experts that have arrived come before other
        residents, since loads wait for their ring slots. On a device residents come first: its stream has
        been made to wait for the copies, so it computes these meanwhile.
        """
        leaving, state.victims = min(state.victims, self._most), max(0, state.victims - self._most)
        if leaving:
            return [state.here.popleft() for _ in range(leaving)]
        queues = (state.here, state.ready) if self._copies is not None else (state.ready, state.here)
        queue = next((queue for queue in queues if queue), None)
        return [queue.popleft() for _ in range(min(self._most, len(queue)))] if queue else []

    def _lend(
        self, layer: int, group: list[int], recent: Sequence[int]
    ) -> Generator[list[Lease], None, None]:
        cache, arena = self._tier.cache, self._tier.arena
        leases, slots = [], []
        for expert in group:
            slot = cache.slot_of(layer, expert)
            assert slot is not None
            slots.append(slot)
            leases.append(Lease(expert, arena.buffer(layer, slot), self._layouts[layer][expert]))
        self._leased += len(group)
        moving: int | None = None
        try:
            yield leases
            for expert in group:
                if expert in recent and cache.staging.has(layer, expert):
                    moving = expert
                    slots.extend(self._admit(layer, expert, recent))
                    moving = None
        finally:
            self._leased -= len(group)
            cache.release(layer, group)
            if moving is not None and cache.slot_of(layer, moving) is not None:
                cache.staging.evict(layer, moving)  # nobody knows what the failed move left in its slot
            if self._copies is not None:  # last, since recording an event on a lost device raises
                self._copies.read_by(layer, slots)
        self._tier.poll()

    def _admit(self, layer: int, expert: int, recent: Sequence[int]) -> list[int]:
        """Move a staged expert from the ring to a slot of its layer; [slot], or [] if there is none.

        The copy takes a fraction of the time that loading it again would.
        """
        staging, arena = self._tier.cache.staging, self._tier.arena
        slot = self._tier.cache.slot_of(layer, expert)
        admitted = staging.admit(layer, expert, recent)
        if admitted is None or slot is None:
            return []
        nbytes = self._layouts[layer][expert].nbytes
        destination, source = (arena.buffer(layer, place)[:nbytes] for place in (admitted, slot))
        device = self._tier.device_of(layer)
        if device is None:
            destination.copy_(source)
        else:
            device.move(destination, source)
        return [admitted]

    def _wait(self, state: _Pass) -> None:
        """Block until some load makes progress, at most LOOK_SECONDS."""
        if state.waiting or self._tier.loading:
            self._arrivals.wait(state)
            return
        if not state.admitted:
            raise RuntimeError("every staging slot is leased to another iterator")
        # No slot of the layer will do for them, because of their size or because another iterator has it: so
        # they pass through the ring as well, and experts that were read ahead make room.
        state.passing.extend(state.admitted)
        state.admitted.clear()
        self.clear(state.layer, state.passing)


def announcer(prefill: PrefillStream, before: Callable[[], None]) -> Callable[..., None]:
    """A forward pre-hook that tells `begin` how many rows and tokens the model is about to compute.

    If there are several tokens per row, `before` is called first: reading ahead will take slots.
    """

    def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        rows, length = (1, 1) if inputs is None else inputs.shape[:2]
        if length > 1:
            before()
        prefill.begin(rows, length)

    return announce
