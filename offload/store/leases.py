"""The leases that the ExpertStore hands to kernels, and the progress of a layer that is being served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moe_local.offload.quantize.layout import Layout


class Lease(NamedTuple):
    """An expert that kernels may read until the consumer of `ExpertStore.serve` asks for the next group."""

    expert: int
    buffer: torch.Tensor
    """The slot, as uint8; its first `layout.nbytes` bytes are the expert."""
    layout: Layout
    on_host: bool = False
    """Whether the buffer is in RAM below a device, for the host to compute with."""


@dataclass(slots=True)
class Serving:
    """One layer's experts on their way through `ExpertStore.serve`: each is in one list after another."""

    layer: int
    experts: Sequence[int]
    """All that the step needs, in the router's order."""
    tokens: Callable[[int], int] | None
    """Expert -> how many tokens it has; None: the CPU may compute none."""
    todo: list[int]
    """Not pinned yet: there was no room."""
    waiting: list[int] = field(default_factory=list)
    """Pinned, not readable yet."""
    ready: list[int] = field(default_factory=list)
    """Pinned and readable, not handed out yet."""
    slots: dict[int, int] = field(default_factory=dict)
    """Slot of each expert that was pinned."""
    late: set[int] = field(default_factory=set)
    """Experts whose prefetch was still in flight when they were needed."""
    host: list[int] = field(default_factory=list)
    """Pinned in RAM, for the host to compute, not handed out yet."""
    waves: bool = False
    """Whether there is no room for all at once, so that a slot is loaded again once its expert was used."""
    used: list[int] = field(default_factory=list)
    """Handed out and back, still pinned: a step that fits never evicts an expert of its own."""


class Tally(NamedTuple):
    """Running totals; a token's record is the difference between two of them."""

    stall_s: float
    hits: int
    misses: int
    bytes_h2d: int
    bytes_disk: int

    def plus(self, other: Tally) -> Tally:
        return Tally._make(one + more for one, more in zip(self, other, strict=True))

    def minus(self, other: Tally) -> Tally:
        return Tally._make(one - less for one, less in zip(self, other, strict=True))


NOTHING = Tally(0.0, 0, 0, 0, 0)
