"""The records of a placement: the request, the slots of each tier, and the speed that they allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from moe_local.cache.errors import DoesNotFitError, OptionError
from moe_local.cache.ladder import arena_bytes, slot_ladder
from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.plan import estimate, footprint
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.quantize.mix import Mix

Ladders = tuple[tuple[int, ...], ...]

Mode = Literal["resident", "offload", "disk"]

DEFAULT_CONTEXT = 8192
"""Tokens of context planned for if the user gives none; less if the model's context is shorter."""


def default_context(spec: ModelSpec) -> int:
    """Tokens of context if the user gives none."""
    return min(spec.max_context, DEFAULT_CONTEXT)


@dataclass(frozen=True, slots=True)
class Request:
    """The model and settings to place, and the memory that may be used.

    Raises OptionError if the context is longer than the model's, or `slots` fewer than a token's experts.
    """

    model: str
    """What the user calls it, for messages."""
    spec: ModelSpec = field(repr=False)
    ram: int
    """Bytes of RAM that may be used."""
    vram: int | None = None
    """Bytes of VRAM that may be used, on all cards together; None: no GPU."""
    experts: str = "nf4"
    dense: str = "auto"
    context: int = DEFAULT_CONTEXT
    slots: int | None = None
    """Experts per MoE layer in the fastest tier; None: as many as fit."""
    bandwidths: Bandwidths = field(default_factory=Bandwidths)
    parallel: int = 1
    """Sequences at a time, each with a context of its own."""
    cards: tuple[int, ...] = ()
    """The part of `vram` on each card if there are several, else empty."""
    mix: Mix | None = field(default=None, repr=False)
    """For experts "mixed:BITS": the format of each expert, once known."""
    budget: str | None = None
    """For experts "auto": the options that limit them, as LoadOptions.budget."""
    use: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)
    """`use[layer][expert]`: how often each expert was chosen, as far as that is known."""

    def __post_init__(self) -> None:
        if self.context > self.spec.max_context:
            raise OptionError(
                f"context {self.context} is beyond the {self.spec.max_context} tokens that {self.model} takes"
            )
        if len(self.cards) > self.spec.num_layers:
            raise ValueError(f"{len(self.cards)} cards for {self.spec.num_layers} decoder layers")
        if self.cards and sum(self.cards) != self.vram:
            raise ValueError(f"cards of {self.cards} bytes do not have {self.vram} together")
        if self.slots is not None and self.slots < self.spec.top_k:
            raise OptionError(
                f"slots {self.slots} is below the {self.spec.top_k} experts of a layer that one token of "
                f"{self.model} needs; use {self.spec.top_k} to {self.spec.num_experts}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return footprint.compute_dtype(self.spec, self.dense)

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of RAM for snapshots of states."""
        return self.parallel * footprint.snapshot_bytes(self.spec)

    @property
    def context_text(self) -> str:
        """Room for tokens, in words."""
        return f"{'' if self.parallel == 1 else f'{self.parallel} x '}{self.context} tokens"

    @property
    def ladders(self) -> Ladders:
        """Bytes of each slot of each MoE layer; a tier with n slots in a layer has the first n of them."""
        sizes = footprint.expert_sizes(self.spec, self.experts, self.mix)
        return tuple(
            slot_ladder(each, layer.top_k, None if self.use is None else self.use[layer.index])
            for each, layer in zip(sizes, self.spec.layers, strict=True)
        )

    @property
    def expected_sizes(self) -> tuple[float, ...]:
        """For each MoE layer, the mean bytes of an expert that a token needs."""
        expected = []
        for layer, sizes in enumerate(footprint.expert_sizes(self.spec, self.experts, self.mix)):
            use = self.use[layer] if self.use is not None and any(self.use[layer]) else [1] * len(sizes)
            needed = (size * count for size, count in zip(sizes, use, strict=True))
            expected.append(sum(needed) / sum(use))
        return tuple(expected)

    @property
    def active_bytes(self) -> int:
        """Mean bytes of all experts that a token needs."""
        return round(
            sum(layer.top_k * size for layer, size in zip(self.spec.layers, self.expected_sizes, strict=True))
        )

    def with_vram(self, size: int) -> Request:
        """This request with `size` bytes of VRAM on its card, or on each of its cards."""
        count = max(1, len(self.cards))
        return replace(self, vram=count * size, cards=(size,) * len(self.cards))


@dataclass(frozen=True, slots=True)
class Card:
    """The part of a plan that is on one of several cards."""

    vram: int
    """Bytes that may be used there."""
    fixed: int
    """Bytes planned for the dense part, KV cache and workspace."""
    layers: range
    """Decoder layers."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Sizes of the parts. `expert` is one expert of the widest layer, `experts_total` all of them."""

    dense: int
    kv: int
    workspace: int
    expert: int
    experts_total: int

    @property
    def fixed(self) -> int:
        """What the fastest tier holds before any expert."""
        return self.dense + self.kv + self.workspace


@dataclass(frozen=True, slots=True)
class Plan:
    """The placement of a model. If it does not fit, no tier has slots and `mode` is None."""

    request: Request
    fits: bool
    mode: Mode | None
    bytes: Bytes
    chunk: int
    """Prompt tokens in one forward."""
    vram_slots: tuple[int, ...]
    """Experts per MoE layer; all 0 without a GPU."""
    ram_slots: tuple[int, ...]
    vram_staging: int = 0
    """Additional slots, of the largest expert's size, through which prompts stream, on each card with
    experts; 0 if all experts are resident."""
    ram_staging: int = 0
    shortfall_bytes: int = 0
    """How far the tightest budget is exceeded."""
    reason: str | None = None
    nearest: str | None = None
    """Flags that, in place of the given ones, make the model fit."""
    cards: tuple[Card, ...] = ()
    """The part of the plan on each card, if there are several and the model needs them."""

    def card_of(self, layer: int) -> int:
        """The index in `cards` of the card that a MoE layer is on; 0 if there is only one card."""
        at = self.request.spec.layers[layer].decoder_layer
        return next((number for number, card in enumerate(self.cards) if at in card.layers), 0)

    def on_card(self, number: int) -> dict[str, Any]:
        """One card's budget, planned bytes, first and last decoder layer, least and most slots, staging."""
        card, ladders = self.cards[number], self.request.ladders
        mine = [layer for layer in range(len(ladders)) if self.card_of(layer) == number]
        slots = [self.vram_slots[layer] for layer in mine]
        experts = arena_bytes(slots, tuple(ladders[layer] for layer in mine))
        staging = self.vram_staging if mine else 0
        return {
            "vram": card.vram,
            "used": card.fixed + experts + staging * largest(ladders),
            "layers": [card.layers.start, card.layers.stop - 1],
            "slots": [min(slots, default=0), max(slots, default=0)],
            "staging": staging,
        }

    @property
    def resident_fraction(self) -> float:
        """Share of all experts that the fastest tier holds."""
        return _share(self.ram_slots if self.request.vram is None else self.vram_slots, self.request.spec)

    @property
    def tokens_per_s(self) -> float | None:
        """The estimate of offload/plan/estimate.py; None if the model does not fit."""
        return self._speed(self.resident_fraction) if self.fits else None

    @property
    def resident_tokens_per_s(self) -> float:
        """The same estimate if all experts were in the fastest tier."""
        return self._speed(1.0)

    def _speed(self, share: float, *, dispatch: bool = True) -> float:
        request, cuda = self.request, self.request.vram is not None
        return estimate.tokens_per_second(
            self._traffic(share), request.spec, request.bandwidths, cuda=cuda, dispatch=dispatch
        )

    @property
    def missed_bytes_per_s(self) -> float:
        """Mean bytes per second of missed experts: over the link, and from disk if RAM lacks them."""
        request = self.request
        return estimate.missed_bytes_per_second(
            self._traffic(self.resident_fraction),
            request.spec,
            request.bandwidths,
            cuda=request.vram is not None,
        )

    @property
    def roofline(self) -> float:
        """Tokens a second that the bytes alone would allow if all experts were in the fastest tier."""
        return self._speed(1.0, dispatch=False)

    @property
    def assumed(self) -> bool:
        """Whether the estimate rests on a bandwidth that was not measured on this machine."""
        return self.request.bandwidths.assumed(self._links())

    def _links(self) -> frozenset[str]:
        return estimate.links(self._traffic(self.resident_fraction), cuda=self.request.vram is not None)

    def _traffic(self, fastest_share: float) -> estimate.Traffic:
        request, spec = self.request, self.request.spec
        return estimate.Traffic(
            dense=estimate.read_per_token(
                spec,
                self.bytes.dense,
                self.bytes.kv // request.parallel,
                request.context,
                request.dtype.itemsize,
            ),
            experts=request.active_bytes,
            fastest_share=fastest_share,
            ram_share=0.0 if request.vram is None else _share(self.ram_slots, spec),
        )

    def slots_per_layer(self, slots: Sequence[int]) -> int:
        """The fewest slots among the widest MoE layers; some may have one more."""
        spec = self.request.spec
        widest = [layer.index for layer in spec.layers if layer.num_experts == spec.num_experts]
        return min(slots[index] for index in widest)

    def used(self) -> dict[str, int]:
        """Planned bytes by tier."""
        ladders = self.request.ladders
        cards = len({self.card_of(layer) for layer in range(len(ladders))})
        vram = arena_bytes(self.vram_slots, ladders) + cards * self.vram_staging * largest(ladders)
        ram = arena_bytes(self.ram_slots, ladders) + self.ram_staging * largest(ladders)
        ram += self.request.snapshot_bytes
        if self.request.vram is None:
            return {"vram": 0, "ram": ram + self.bytes.fixed}
        return {"vram": vram + self.bytes.fixed, "ram": ram}

    @property
    def shelf_bytes(self) -> int:
        """Bytes of RAM, out of what the plan leaves over, for conversations whose rows others need."""
        return max(0, min(footprint.MOST_SHELVED, self.request.ram - self.used()["ram"]))

    def check(self) -> Plan:
        """This plan. Raises DoesNotFitError, which says by how much and what would fit, if it does not."""
        if not self.fits:
            remedy = f"; {self.nearest} fits" if self.nearest else ""
            raise DoesNotFitError(f"{self.reason}{remedy}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: all of the plan that a user may want to see."""
        request, spec = self.request, self.request.spec
        figures = request.bandwidths.to_dict()
        return {
            "model": request.model,
            "architecture": spec.architecture,
            "parameters": {"total": spec.total_numel, "active": spec.active_numel, "dense": spec.dense_numel},
            "moe_layers": len(spec.layers),
            "experts_per_layer": spec.num_experts,
            "top_k": spec.top_k,
            "device": "cpu" if request.vram is None else "cuda",
            "budget": {"vram": request.vram or 0, "ram": request.ram},
            "cards": [self.on_card(number) for number in range(len(self.cards))],
            "experts": request.experts,
            "dense": request.dense,
            "context": request.context,
            "parallel": request.parallel,
            "prefill_chunk": self.chunk,
            "fits": self.fits,
            "mode": self.mode,
            "bytes": {
                "dense": self.bytes.dense,
                "kv": self.bytes.kv,
                "snapshots": self.request.snapshot_bytes,
                "workspace": self.bytes.workspace,
                "expert": self.bytes.expert,
                "experts_total": self.bytes.experts_total,
            },
            "used": self.used(),
            "slots": {
                "vram": self.slots_per_layer(self.vram_slots),
                "ram": self.slots_per_layer(self.ram_slots),
            },
            "staging": {"vram": self.vram_staging, "ram": self.ram_staging},
            "experts_resident_fraction": self.resident_fraction,
            "tokens_per_s_estimate": self.tokens_per_s,
            "tokens_per_s_if_resident": self.resident_tokens_per_s,
            "tokens_per_s_roofline": self.roofline,
            "assumed": self.assumed,
            "bandwidths": {name: figures[name] for name in sorted(self._links())},
            "shortfall_bytes": self.shortfall_bytes,
            "reason": self.reason,
            "nearest": self.nearest,
        }


def largest(ladders: Ladders) -> int:
    """Bytes of the largest slot, and so of the largest expert."""
    return max(map(max, ladders))


def _share(slots: Sequence[int], spec: ModelSpec) -> float:
    return sum(slots) / sum(layer.num_experts for layer in spec.layers)
