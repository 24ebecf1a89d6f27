"""What kernels get from the ExpertStore, and how far a layer is with getting it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moe_local.offload.quantize.layout import Layout


class Lease(NamedTuple):
    """An expert that kernels may read until the consumer of `ExpertStore.serve` asks for the next group."""

    expert: int
    buffer: torch.Tensor
    """uint8, the slot; the first `layout.nbytes` are the expert's."""
    layout: Layout
    on_host: bool = False
    """Whether the buffer is in RAM below a device, for the host to compute with."""


@dataclass(slots=True)
class Serving:
    """One layer's experts on their way through `ExpertStore.serve`: each is in one list after another."""

    layer: int
    todo: list[int]
    """Not pinned yet: there was no room."""
    waiting: list[int] = field(default_factory=list)
    """Pinned, not readable yet."""
    ready: list[int] = field(default_factory=list)
    """Pinned and readable, not handed out yet."""
    slots: dict[int, int] = field(default_factory=dict)
    """Slot of each expert that was pinned."""
    late: set[int] = field(default_factory=set)
    """Those that a prefetch was bringing when they were needed."""
    host: list[int] = field(default_factory=list)
    """Pinned in RAM, for the host to compute, not handed out yet."""
    waves: bool = False
    """Whether there is no room for all at once, so that a slot is loaded again once its expert was used."""
    used: list[int] = field(default_factory=list)
    """Handed out and back, still pinned: a step that fits never evicts an expert of its own."""


class Tally(NamedTuple):
    """What a token's record is the difference of."""

    stall_s: float
    hits: int
    misses: int
    bytes_h2d: int
    bytes_disk: int
