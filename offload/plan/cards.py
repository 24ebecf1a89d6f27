"""One model on several cards: which card gets which layers, and how many experts of each.

Decoder layers are assigned in order, the embeddings to the first card and the output head to the last. An
expert is cached on the card of its layer, so a card's layers share the memory that its dense part leaves.
Layers are cut between cards so that every layer, on whichever card, gets about the same number of slots: then
misses are expected to be equally frequent in all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_local.cache.keys import format_bytes
from moe_local.offload.checkpoint.spec import ModelSpec, layer_number
from moe_local.offload.plan import footprint
from moe_local.offload.plan.plan import Card, Request, largest

STEPS = 64
"""Resolution in which cuts are compared: levels are 1 / STEPS slots per layer."""


class _Layer(NamedTuple):
    """A decoder layer: bytes of its dense part and KV cache, and of its slots for experts, if any."""

    fixed: int
    ladder: tuple[int, ...] = ()

    @property
    def num_experts(self) -> int:
        return len(self.ladder)

    def needs(self, level: int) -> int:
        """Bytes of the layer with `level` / STEPS slots, but at most one slot per expert."""
        slots, part = divmod(min(level, STEPS * self.num_experts), STEPS)
        cut = -(-part * self.ladder[slots] // STEPS) if part else 0
        return self.fixed + sum(self.ladder[:slots]) + cut


@dataclass(frozen=True, slots=True)
class Cards:
    """The cards of a request, and the bytes that have to be placed on them for a given prompt chunk."""

    request: Request
    layers: tuple[_Layer, ...]
    before: int
    """Dense bytes in front of the layers: the embeddings."""
    behind: int
    """Dense bytes behind them: the last norm and the output head."""
    workspace: int
    """Workspace bytes of each card, without CUDA's own overhead."""
    expert: int
    """Bytes of a staging slot."""
    staging: int = 0
    """Staging slots on each card."""

    @classmethod
    def of(cls, request: Request, chunk: int) -> Cards:
        """The cards of a request that names several."""
        spec = request.spec
        dense, before, behind = _dense_by_layer(spec, request.dense)
        kv = kv_of_a_layer(request)
        ladders = request.ladders
        moe = {layer.decoder_layer: layer for layer in spec.layers}
        layers = tuple(
            _Layer(fixed + kv, ladders[moe[at].index]) if at in moe else _Layer(fixed + kv)
            for at, fixed in enumerate(dense)
        )
        workspace = footprint.workspace_bytes(spec, chunk, request.context, request.dtype)
        return cls(request, layers, before, behind, workspace, largest(ladders))

    def holds(self, slots: int) -> bool:
        """Whether there is a cut with `slots` slots a layer."""
        return self._ends(STEPS * slots) is not None

    def with_ring(self, slots: int) -> Cards:
        """These cards with the longest staging ring that leaves `slots` slots a layer; without a ring if not
        even two staging slots fit.

        Every card has memory for all of the ring's slots, but each slot is used on one card at a time: what
        is read ahead for the next card's first layer alternates with what this card still computes.
        """
        for staging in range(footprint.staging_slots(self.request.spec, self.expert), 1, -1):
            found = replace(self, staging=staging)
            if found.holds(slots):
                return found
        return self

    def cut(self, slots: int) -> tuple[Card, ...] | None:
        """The most even cut with `slots` slots a layer at least; None: there is none."""
        low, high = STEPS * slots, STEPS * max(layer.num_experts for layer in self.layers)
        if not self.holds(slots):
            return None
        high = max(low, high)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._ends(middle) is not None else (low, middle - 1)
        ends = self._ends(low, -self._margin(low)) or []
        starts = [0, *ends[:-1]]
        return tuple(
            Card(
                vram,
                self._own(number) - self.ring + sum(layer.fixed for layer in self.layers[start:end]),
                range(start, end),
            )
            for number, (vram, start, end) in enumerate(zip(self.request.cards, starts, ends, strict=True))
        )

    @property
    def ring(self) -> int:
        """Bytes of each card's ring."""
        return self.staging * self.expert

    def _margin(self, level: int) -> int:
        """The most bytes that every card can leave unused at this level, to spread unused bytes evenly."""
        low, high = 0, min(self.request.cards)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._ends(level, -middle) is None else (middle, high)
        return low

    def shortfall(self, slots: int) -> int:
        """Bytes that each card lacks for `slots` slots a layer."""
        low, high = 0, 1
        while self._ends(STEPS * slots, high) is None:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._ends(STEPS * slots, middle) is None else (low, middle)
        return high

    def _ends(self, level: int, more: int = 0) -> list[int] | None:
        """Where each card's layers end if each takes as many as it can at `level`; None if some are left.

        This greedy assignment finds a cut whenever there is one. `more`: bytes to add to each card's budget,
        which may be negative.
        """
        ends: list[int] = []
        at, count = 0, len(self.request.cards)
        for number, budget in enumerate(self.request.cards):
            room = budget + more - self._own(number, more)
            if room < 0:
                return None
            # every card gets at least one layer: a card without one would only take up fixed bytes
            most = len(self.layers) - (count - 1 - number)
            start = at
            while at < most and self.layers[at].needs(level) <= room:
                room -= self.layers[at].needs(level)
                at += 1
            if at == start:
                return None
            ends.append(at)
        return ends if at == len(self.layers) else None

    def _own(self, number: int, more: int = 0) -> int:
        """Bytes of a card that do not depend on its layers."""
        last = len(self.request.cards) - 1
        ends = (self.before if number == 0 else 0) + (self.behind if number == last else 0)
        return ends + self.workspace + self.ring + footprint.cuda_overhead(self.request.cards[number] + more)


def kv_of_a_layer(request: Request) -> int:
    """Bytes of keys and values that a decoder layer keeps, assumed to be equal for all layers."""
    nbytes = footprint.kv_bytes(request.spec, request.context, request.dtype)
    return request.parallel * -(-nbytes // request.spec.num_layers)


def refusal(request: Request, shortfall: int, slots: int) -> str:
    """Why a request does not fit on its cards, each of which lacks `shortfall` bytes."""
    budgets = ", ".join(format_bytes(card) for card in request.cards)
    return (
        f"{request.model} does not fit: dense part, {request.context_text} of context and {slots} experts "
        f"a layer need {format_bytes(shortfall)} more on each of {len(request.cards)} cards of {budgets}"
    )


def _dense_by_layer(spec: ModelSpec, dense: str) -> tuple[list[int], int, int]:
    """Dense bytes of each decoder layer, in front of all, and behind them."""
    layers, before, behind = [0] * spec.num_layers, 0, 0
    path = spec.layers[0].name.partition(f".{spec.layers[0].decoder_layer}.")[0]
    for tensor, nbytes in zip(spec.dense, footprint.tensor_bytes(spec, dense, cuda=True), strict=True):
        number = layer_number(tensor.name) if tensor.name.startswith(f"{path}.") else None
        if number is not None:
            layers[number] += nbytes
        elif any(layers):
            behind += nbytes
        else:
            before += nbytes
    return layers, before, behind


def layers_by_card(cards: Sequence[Card], spec: ModelSpec) -> list[list[int]]:
    """The MoE layers of each card, by index."""
    return [[layer.index for layer in spec.layers if layer.decoder_layer in card.layers] for card in cards]
