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
"""Tokens at a prompt's end whose experts are admitted. In replays of recorded routes decoding finds most
where all slots are theirs: more tokens gain nothing, fewer cost up to 0.1 of the hit rate (docs/log.md)."""

WHOLE = 0.75
"""Share of a layer's experts that the step uses, from which on the next layer is read ahead whole: reading
fills time in which the link has nothing else to do, and what is not needed is given up half-way."""

SKEW = 8
"""Before a step's first layer has run, this many of its tokens count as one: routers have favourites.
Recorded prompts of 28 and 92 tokens used what 1 in 2.4 and 1 in 5.4 of them would at random."""

AHEAD = 1
"""Priority of what is read for the next layer."""


@dataclass(slots=True)
class _Pass:
    """One layer's experts on their way: each is in one of the lists, in turn."""

    layer: int
    recent: Sequence[int]
    """Those that get a slot of the layer, the last needed last."""
    passing: deque[int] = field(default_factory=deque)
    """Absent, to be staged."""
    admitted: deque[int] = field(default_factory=deque)
    """Absent, to be loaded into a slot of the layer, whoever has to leave it."""
    waiting: list[int] = field(default_factory=list)
    """Pinned, not readable yet."""
    here: deque[int] = field(default_factory=deque)
    """Pinned, resident from the beginning, not handed out yet."""
    ready: deque[int] = field(default_factory=deque)
    """Pinned, arrived since then, not handed out yet."""
    victims: int = 0
    """How many of the first ones `here` have to leave for those admitted."""
    late: set[int] = field(default_factory=set)
    """Those that were on their way before they were needed."""

    @property
    def asked(self) -> bool:
        """Whether all loads have been started."""
        return not self.passing and not self.admitted

    @property
    def over(self) -> bool:
        return self.asked and not (self.waiting or self.here or self.ready)


class PrefillStream:
    """Serves steps of many tokens from a tier with a staging ring, beside the ExpertStore that owns it.

    Such a step needs most experts of a layer, each once. Those that are resident are computed where they
    lie; the others pass through the ring, loading while others are computed, and behind them, as slots come
    free, the next layer's: all of them where this layer's tokens use nearly all, else those that the
    prefetcher names. What only passes evicts nobody, and the eviction order does not notice it.
    But what the step's last tokens needed is what decoding starts with: these are admitted, as many as the
    layer has slots, and touched in the order of their last need, as if the tokens had been decoded.

    Used by the engine's thread alone.
    """

    def __init__(
        self,
        tier: Tier,
        layouts: Sequence[Sequence[Layout]],
        top_k: int,
        arrivals: Arrivals,
    ) -> None:
        """`tier` has a ring of two slots at least. Each token needs `top_k` experts of the first layer."""
        if tier.cache.staging.slots < 2:
            raise ValueError(f"{tier.cache.staging.slots} staging slots; one loads while another is read")
        self.chunk = 0
        """Tokens of the longest steps; one as long as that is probably followed by another of the prompt."""
        self.ahead = True
        """Whether anything is read before its layer has asked for it."""
        self._tier = tier
        self._layouts = layouts
        self._top_k = top_k
        self._arrivals = arrivals
        self._copies = tier.source if isinstance(tier.source, CopySource) else None
        self._most = tier.cache.staging.slots // 2
        self._rows, self._length = 1, 1
        self._share = 0.0
        """Share of a layer's experts that the step's tokens use, as far as is known."""
        self._guesses: dict[int, list[int]] = {}
        self._serving = False
        self._leased = 0

    @property
    def serving(self) -> bool:
        """Whether a step is being served here at this moment."""
        return self._serving

    def begin(self, rows: int, length: int) -> None:
        """A forward of `rows` sequences with `length` tokens each begins: reads ahead for its first layer."""
        self._rows, self._length = rows, length
        self._guesses.clear()
        if length > 1:
            tokens, used = rows * length / SKEW, self._top_k / len(self._layouts[0])
            self._share = 1 - (1 - used) ** tokens
            self._tier.poll()
            self._read_ahead(0)

    def recent(self, layer: int, ids: Sequence[int], distinct: int) -> list[int] | None:
        """The experts whose last need lies in the step's last tokens, the last needed last.

        `ids` are the router's choices, token by token. None if the step is not to be served here: all of the
        layer is resident, or the step is decoding, or so short that a layer's slots hold all it uses.
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
        """A layer to come will probably need these, likeliest first."""
        self._guesses[layer] = list(experts)

    def clear(self, layer: int, experts: Sequence[int]) -> None:
        """Give up what is staged for anything but these, or on its way to this layer and not among them."""
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
        """As ExpertStore.serve, for a layer of a long step; `recent` as it was answered.

        `meanwhile` may have something to do while nothing is readable. Raises TransferError.
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
                    self._ask(state)  # for what was guessed, too
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
        """Pin what is here or on its way, and order the rest."""
        cache = self._tier.cache
        held = cache.staging.hold(layer, experts)
        wanted = set(held.absent).intersection(recent)
        state = _Pass(layer, recent, waiting=held.joined, late=set(held.joined))
        state.passing.extend(expert for expert in held.absent if expert not in wanted)
        state.admitted.extend(expert for expert in recent if expert in wanted)
        for expert in held.joined:
            self._tier.promote(ExpertKey(layer, expert))
        homeless = [e for e in recent if e in wanted or cache.staging.has(layer, e)]
        leaving = cache.staging.next_victims(layer, recent, homeless)
        first = [expert for expert in leaving if expert in held.ready]
        state.victims = len(first)
        state.here.extend([*first, *(expert for expert in held.ready if expert not in first)])
        return state

    def _ask(self, state: _Pass) -> None:
        """Start the loads that there is room for: this layer's, then the next one's."""
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
        """Read ahead for what follows this layer."""
        if layer + 1 < len(self._layouts):
            self._read_ahead(layer + 1)
        elif self._rows == 1 and self._length == self.chunk:
            self._read_ahead(0)

    def _read_ahead(self, layer: int) -> None:
        """Load absent experts of a later layer, as far as there are free slots."""
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
        """What to compute next: a few, so that their slots load again while others are computed.

        Residents that have to leave come first. The host computes what arrived before other residents,
        since its ring's slots are waited for; a device, which has only been told to wait for what arrives,
        computes residents meanwhile.
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
                    slots.extend(self._house(layer, expert, recent))
                    moving = None
        finally:
            self._leased -= len(group)
            cache.release(layer, group)
            if moving is not None and cache.slot_of(layer, moving) is not None:
                cache.staging.evict(layer, moving)  # who knows what is in its slot
            if self._copies is not None:  # last of all: a device may refuse to say where its kernels are
                self._copies.read_by(layer, slots)
        self._tier.poll()

    def _house(self, layer: int, expert: int, recent: Sequence[int]) -> list[int]:
        """Give a staged expert that was read ahead a slot of the layer; that slot, if there is one for it.

        Copying it there takes a fraction of what reading it again would.
        """
        staging, arena = self._tier.cache.staging, self._tier.arena
        slot = self._tier.cache.slot_of(layer, expert)
        housed = staging.house(layer, expert, recent)
        if housed is None or slot is None:
            return []
        nbytes = self._layouts[layer][expert].nbytes
        destination, source = (arena.buffer(layer, place)[:nbytes] for place in (housed, slot))
        device = self._tier.device_of(layer)
        if device is None:
            destination.copy_(source)
        else:
            device.move(destination, source)
        return [housed]

    def _wait(self, state: _Pass) -> None:
        """Block until something moves, at most LOOK_SECONDS."""
        if state.waiting or self._tier.loading:
            self._arrivals.wait(state)
            return
        if not state.admitted:
            raise RuntimeError("every staging slot is leased to another iterator")
        # No slot of the layer is for them, by its size or since somebody else has it: then these pass, too,
        # and what was read ahead makes room.
        state.passing.extend(state.admitted)
        state.admitted.clear()
        self.clear(state.layer, state.passing)


def announcer(prefill: PrefillStream, before: Callable[[], None]) -> Callable[..., None]:
    """A hook that tells what a forward of the model, [rows, length] ids or embeddings, is about to compute.

    `before` is called first where that is several tokens of a row: what is read ahead then takes slots.
    """

    def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        rows, length = (1, 1) if inputs is None else inputs.shape[:2]
        if length > 1:
            before()
        prefill.begin(rows, length)

    return announce
