"""The GPU kernels for single tokens, written with torch operations, none of which waits for the host: for
tests on the CPU, for fake graphs to record, and as references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.offload.checkpoint import skeleton
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.kernels.cpu import CpuExperts
from moe_local.offload.kernels.grouped import GroupedExperts
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.fit import plan_request
from moe_local.offload.plan.footprint import expert_bytes
from moe_local.offload.plan.plan import Request
from moe_local.offload.quantize.layout import Layout

NS_PER_EXPERT = 1000
"""The time for copying an expert that the log reports, by this device's clock."""


class TorchFetch:
    """The Fetch protocol on the CPU. All slots must be in the same storage as their layer's first slot."""

    def look_up(self, tables: Any, ids: torch.Tensor, *, begins: bool) -> torch.Tensor:
        if begins:
            tables.clock.add_(1)
        slot_of, expert_in, used, log = tables.slot_of, tables.expert_in, tables.used, tables.log
        there = slot_of.index_select(0, ids)
        absent = there < 0
        known, listed = tables.order[:1], tables.order[1:]
        real = listed >= 0
        slots = listed.clamp(min=0)
        open_ = real & ~(listed[:, None] == there[None, :]).any(dim=1)
        late = used.index_select(0, slots) > known
        first, later = open_ & ~late, open_ & late
        turn = torch.where(first, first.cumsum(0), first.sum() + later.cumsum(0))
        fill = (turn[:, None] == absent.cumsum(0)[None, :]) & open_[:, None] & absent[None, :]
        filled = torch.where(fill, listed[:, None], 0).sum(dim=0)
        where = torch.where(absent, filled, there)
        leaving = torch.where(fill.any(dim=1), expert_in.index_select(0, slots), -1)
        experts, places = torch.arange(len(slot_of)), torch.arange(len(expert_in))
        gone = (experts[:, None] == leaving[None, :]).any(dim=1)
        came = (experts[:, None] == ids[None, :]) & absent[None, :]
        slot_of.copy_(
            torch.where(
                came.any(dim=1), torch.where(came, where, 0).sum(dim=1), torch.where(gone, -1, slot_of)
            )
        )
        held = (places[:, None] == where[None, :]) & absent[None, :]
        expert_in.copy_(torch.where(held.any(dim=1), torch.where(held, ids, 0).sum(dim=1), expert_in))
        touched = (places[:, None] == where[None, :]).any(dim=1)
        used.copy_(torch.where(touched, tables.clock, used))
        log[:1].copy_(tables.clock)
        log[2:3].copy_(log[1:2] + NS_PER_EXPERT * absent.sum())
        log[4 : 4 + len(ids)].copy_(ids)
        log[4 + len(ids) :].copy_(torch.where(absent, filled, -1))
        return torch.stack([tables.offsets.index_select(0, where), torch.arange(len(ids))], dim=1)

    def bring(self, tables: Any, memory: torch.Tensor, base: torch.Tensor, nbytes: int) -> None:
        count = (len(tables.log) - 4) // 2
        ids, filled = tables.log[4 : 4 + count], tables.log[4 + count :]
        whole = _words(base.as_strided((base.untyped_storage().nbytes(),), (1,), 0))
        ram = _words(memory.as_strided((memory.untyped_storage().nbytes(),), (1,), 0))
        word = torch.arange(nbytes // 8)
        for rank in range(count):
            slot = filled[rank : rank + 1]
            source = (memory.storage_offset() + tables.sources.index_select(0, ids[rank : rank + 1])) // 8
            offset = tables.offsets.index_select(0, slot.clamp(min=0)) * 16
            target = (base.storage_offset() + offset) // 8 + word
            brought = torch.where(
                slot >= 0, ram.index_select(0, source + word), whole.index_select(0, target)
            )
            whole.index_copy_(0, target, brought)


class Launcher:
    """The Launcher of kernels.launcher in torch, for fp32 experts; finds their bytes by base, stride and
    table."""

    def __init__(self, math: Any, layout: Layout) -> None:
        self.layout, self._math = layout, math
        shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        self.width, self.hidden = shapes["down_proj"]
        self._first = next(name for name in ("gate_up_proj", "up_proj") if name in shapes)

    def planes(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()

    def up(self, base: Any, stride: int, table: Any, planes: Any, hidden: Any, top_k: int) -> None:
        x = planes.index_select(0, table[:, 1] // top_k)
        hidden.index_copy_(
            0, table[:, 1], self._math.activate(self._linear(base, stride, table, x, self._first))
        )

    def down(self, base: Any, stride: int, table: Any, hidden: Any, outputs: Any) -> None:
        x = hidden.index_select(0, table[:, 1])
        outputs.index_copy_(0, table[:, 1], self._linear(base, stride, table, x, "down_proj"))

    def combine(self, outputs: Any, weights: Any, combined: Any) -> None:
        combined.copy_((outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1))

    def _linear(self, base: Any, stride: int, table: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        """x [G, in] -> [G, out]"""
        weights = self._weights(base, stride, table, name)
        # One product per expert, so that the rounding does not depend on the others of a group.
        y = torch.stack([weight.mv(each) for weight, each in zip(weights, x, strict=True)])
        return y + self._weights(base, stride, table, f"{name}_bias") if self._math.has_bias else y

    def _weights(self, base: Any, stride: int, table: Any, name: str) -> torch.Tensor:
        """fp32 [G, out, in], or [G, out] for a bias."""
        (segment,) = self.layout.parts(name)
        memory = base.as_strided((base.untyped_storage().nbytes(),), (1,), 0)
        starts = base.storage_offset() + table[:, 0] * stride + segment.offset
        places = starts.unsqueeze(1) + torch.arange(segment.nbytes)
        packed = memory.index_select(0, places.flatten()).view(len(table), segment.nbytes)
        return packed.view(torch.float32).view(len(table), *segment.shape)


def in_one_piece(device: Any, nbytes: int = 1 << 25) -> Any:
    """The device, changed so that all its allocations are parts of one storage, since a Launcher or
    TorchFetch cannot reach from one storage into another."""
    allocate, memory, taken = device.allocate, torch.zeros(nbytes, dtype=torch.uint8), 0

    def carve(nbytes: int) -> torch.Tensor:
        nonlocal taken
        allocate(nbytes)
        part = memory[taken : taken + nbytes]
        taken += -(-nbytes // 512) * 512
        assert taken <= memory.numel()
        return part

    device.adopt(memory)
    device.allocate = carve
    return device


def devices(make_device: Callable[..., Any]) -> Callable[..., Any]:
    """`make_device`, but for devices `in_one_piece`, whose slots a Launcher can find."""
    return lambda *arguments, **options: in_one_piece(make_device(*arguments, **options))


def load(
    folder: Path, device: Any, graphs: Any = None, *, slots: int, context: int, **options: Any
) -> moe_local.Model:
    """Load like `moe_local.load` on a card with `slots` slots per layer over RAM that holds all experts, in
    fp32."""
    checkpoint = Checkpoint.open(folder)
    given = {"slots": slots, "context": context, "experts": "fp32", "dense": "fp32"}
    request = Request(
        model=checkpoint.name,
        spec=checkpoint.spec,
        ram=8 * sum(expert_bytes(checkpoint.spec, "fp32")),
        vram=2**30,
        **given,
    )
    settings = LoadOptions(**{"miss": "fetch"} | given | options)
    file, cpu = open_experts(checkpoint, "fp32"), torch.device("cpu")
    return assemble(checkpoint, file, plan_request(request).check(), settings, cpu, device, graphs=graphs)


LIBRARY = (
    *("use_native_linears", "use_native_norms", "use_native_gated_norms", "use_native_routers"),
    *("use_token_attention", "use_token_delta_nets", "use_token_mamba2", "use_token_mlps"),
    "use_token_layers",
)
"""What hands parts of a model to the C++ library."""


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Launchers compute single tokens, and disable the C++ library, which fake graphs cannot record."""
    for name in LIBRARY:
        monkeypatch.setattr(skeleton, name, lambda model: None)
    monkeypatch.setattr(CpuExperts, "serves", lambda self, *arguments: False)
    monkeypatch.setattr(
        GroupedExperts,
        "serves",
        lambda self, math, x, routing, layout: routing.tokens == 1,
    )
    launchers: dict[Any, Launcher] = {}

    def launcher(self: GroupedExperts, math: Any, device: torch.device, layout: Layout) -> Any:
        return launchers.setdefault(math, Launcher(math, layout))

    monkeypatch.setattr(GroupedExperts, "launcher", launcher)
    monkeypatch.setattr("moe_local.offload.experts.try_out", lambda *arguments, **options: None)


def _words(memory: torch.Tensor) -> torch.Tensor:
    return memory[: memory.numel() // 8 * 8].view(torch.int64)
