"""Says once where experts take the reference path, for want of a kernel that reads them."""

from __future__ import annotations

import logging

import torch

from moe_local.offload.kernels import cpu
from moe_local.offload.kernels.contracts import ExpertMath
from moe_local.offload.kernels.grouped import GroupedExperts
from moe_local.offload.kernels.launcher import Launcher, triton_kernels
from moe_local.offload.native.library import library
from moe_local.offload.quantize.layout import Layout

logger = logging.getLogger("moe_local")

WITHOUT_ONE = ("fp32", "bf16", "fp16")
"""What torch multiplies as it is; on a GPU nothing else is needed."""


class Fallback:
    """What has been said of one store's experts."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], Layout] = {}
        self._said: set[tuple[str, str]] = set()

    def tell(self, math: ExpertMath, x: torch.Tensor, layout: Layout, grouped: GroupedExperts) -> None:
        """Say what keeps experts of this layout from a kernel, if something does, once for each format."""
        kind = x.device.type
        if (id(layout), kind) in self._seen:
            return
        self._seen[id(layout), kind] = layout  # kept, so that its id is its own
        why = _on_cpu(layout) if kind == "cpu" else _on_gpu(math, x.device, layout, grouped)
        if why is None or (layout.format, why) in self._said:
            return
        self._said.add((layout.format, why))
        logger.warning(
            "experts in %s take the reference path, torch decoding each at every use, which is slow: %s",
            described(layout),
            why,
        )


def described(layout: Layout) -> str:
    """The format, and what is unusual about its parts."""
    parts = {segment.part for segment in layout.segments}
    numbers = {segment.dtype for segment in layout.segments if segment.part == "q"}
    unusual = sorted(parts & {"transposed"}) + sorted(numbers & {"float8_e5m2"})
    return f"{layout.format} ({', '.join(unusual)})" if unusual else layout.format


def _on_cpu(layout: Layout) -> str | None:
    if cpu.reads(layout) or library() is None:  # which has said so itself
        return None
    return 'no CPU kernel reads them so; experts="int8" or "nf4" converts them once'


def _on_gpu(math: ExpertMath, device: torch.device, layout: Layout, grouped: GroupedExperts) -> str | None:
    """bitsandbytes has kernels for NF4, and torch for plain numbers, whichever way they lie."""
    if layout.format in (*WITHOUT_ONE, "nf4", "plain"):
        return None
    if grouped.launcher(math, device, layout) is not None:
        return None  # a prompt: decoded once for many tokens
    if not Launcher.served(layout):
        return 'no GPU kernel reads them so; experts="nf4" converts them once'
    if triton_kernels(device) is None:
        return 'GPU kernels need Triton, which does not run here; experts="nf4" does without'
    return 'no GPU kernel has this model\'s activation; experts="nf4" does without'
