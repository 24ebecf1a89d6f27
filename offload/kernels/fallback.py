"""Warns once when experts take the slow reference path because no kernel reads their format."""

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
"""Formats that torch multiplies without decoding; on a GPU they need no other kernel."""


class Fallback:
    """Warns about one store's experts, and remembers what it has said."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], Layout] = {}
        self._said: set[tuple[str, str]] = set()

    def tell(self, math: ExpertMath, x: torch.Tensor, layout: Layout, grouped: GroupedExperts) -> None:
        """Warn if no kernel serves experts of this layout, and say why; once per format and reason."""
        kind = x.device.type
        if (id(layout), kind) in self._seen:
            return
        self._seen[id(layout), kind] = layout  # kept, so that no other layout gets its id
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
    if cpu.reads(layout) or library() is None:  # a missing library has its own warning
        return None
    return 'no CPU kernel reads them so; experts="int8" or "nf4" converts them once'


def _on_gpu(math: ExpertMath, device: torch.device, layout: Layout, grouped: GroupedExperts) -> str | None:
    """Why no kernel serves the layout, or None. bitsandbytes serves NF4, and torch unquantized weights."""
    if layout.format in (*WITHOUT_ONE, "nf4", "plain"):
        return None
    if grouped.launcher(math, device, layout) is not None:
        return None  # then only prompts come here, and decode weights once for many tokens
    if not Launcher.served(layout):
        return 'no GPU kernel reads them so; experts="nf4" converts them once'
    if triton_kernels(device) is None:
        return 'GPU kernels need Triton, which does not run here; experts="nf4" does without'
    return 'no GPU kernel has this model\'s activation; experts="nf4" does without'
