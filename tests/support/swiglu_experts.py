"""Stand-ins for experts with SwiGLU in any format, with only the attributes that warming kernels up uses."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from moe_local.offload.experts import ExpertRunner
from moe_local.offload.quantize.layout import Layout, TensorSpec
from support import expert_math
from support.expert_codecs import expert_codec

WIDTH, HIDDEN = 256, 128


class Math(expert_math.Math):
    """Stands in for a layer's OffloadedExperts."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index


def layout_of(format: str) -> Layout:
    specs = [TensorSpec("gate_up_proj", (2 * HIDDEN, WIDTH)), TensorSpec("down_proj", (WIDTH, HIDDEN))]
    layout: Layout = expert_codec(format).layout(specs)
    return layout


def runner_of(
    kinds: Sequence[Sequence[Layout]], top_k: Sequence[int], slots: Sequence[torch.Tensor]
) -> ExpertRunner:
    """A runner for layers whose experts have the layouts `kinds`; `slots` has each layer's first slot."""
    arena = SimpleNamespace(buffer=lambda layer, slot: slots[layer], device=torch.device("cpu"))
    store: Any = SimpleNamespace(
        tier=SimpleNamespace(arena=arena, devices=()),
        kinds=kinds,
        routed=SimpleNamespace(top_k=lambda layer: top_k[layer]),
    )
    prefetcher: Any = None
    return ExpertRunner(store, prefetcher)
