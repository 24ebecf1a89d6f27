"""The scheduler's initial costs: estimated from bandwidths, then measured while a model is loaded."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from moe_local.offload.kernels.contracts import ExpertMath
from moe_local.offload.kernels.layer import LayerKernels
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native.library import library
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.schedule.costs import Costs, Work
from moe_local.offload.store.store import ExpertStore

CPU_LATENCY_S = 30e-6
"""Seconds of a call of the C++ kernel without any work."""
LINK_LATENCY_S = 15e-6
"""Seconds of a copy without any bytes."""
CPU_EFFICIENCY = 0.8
"""Share of the memory's bandwidth that the C++ kernel is assumed to reach until it has been measured."""
CPU_EFFICIENCY_TORCH = 0.03
"""The same where torch computes instead."""

TOKENS = (1, 4, 16)
READ_BYTES = 256 << 20
"""Bytes of experts that a measurement computes: more than a last-level cache holds."""
LEAST_EXPERTS = 4


class _Resident(NamedTuple):
    """An expert in RAM."""

    expert: int
    buffer: torch.Tensor
    layout: Layout
    on_host: bool = True


def first_costs(bandwidths: Bandwidths) -> Costs:
    """Costs estimated from a machine's bandwidths, before any expert was computed."""
    efficiency = CPU_EFFICIENCY if library() is not None else CPU_EFFICIENCY_TORCH
    return Costs(
        cpu={1: efficiency * bandwidths.ram},
        cpu_latency_s=CPU_LATENCY_S,
        link=bandwidths.h2d,
        link_latency_s=LINK_LATENCY_S,
        memory=bandwidths.ram,
        gpu=bandwidths.vram,
    )


def measure_cpu(
    costs: Costs,
    store: ExpertStore,
    math: ExpertMath,
    kernels: LayerKernels,
    *,
    layer: int,
    hidden_size: int,
    dtype: torch.dtype,
) -> None:
    """Time the CPU on experts of a layer that are in RAM, with several numbers of tokens; updates `costs`.

    Each format is measured by itself; a format without experts in RAM keeps its costs. Blocks for some tenths
    of a second with large experts.
    """
    for layout in store.kinds[layer]:
        _measure(costs, store, math, kernels, layout, layer=layer, hidden_size=hidden_size, dtype=dtype)


def _measure(
    costs: Costs,
    store: ExpertStore,
    math: ExpertMath,
    kernels: LayerKernels,
    layout: Layout,
    *,
    layer: int,
    hidden_size: int,
    dtype: torch.dtype,
) -> None:
    """`measure_cpu` for the layer's experts of one layout."""
    assert store.below is not None
    cache, arena, layouts = store.below.cache, store.below.arena, store.layouts[layer]
    most = max(LEAST_EXPERTS, READ_BYTES // layout.nbytes)
    experts = []
    for expert in [expert for expert in cache.residents(layer) if layouts[expert] is layout][:most]:
        slot = cache.slot_of(layer, expert)
        assert slot is not None
        experts.append(_Resident(expert, arena.buffer(layer, slot), layout))
    if not experts:
        return
    nbytes = sum(resident.layout.nbytes for resident in experts)
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden_size, dtype=torch.float32).to(dtype)
        ids = [resident.expert for resident in experts] * tokens
        answers = kernels.answers(math, x, Routing(ids, tokens, len(layouts)), layout)
        out = torch.empty(len(ids), hidden_size, dtype=torch.float32)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            answers.compute(experts, out)
            times.append(time.perf_counter() - start)
        costs.set_cpu(Work(nbytes, tokens, layout.format), min(times))
