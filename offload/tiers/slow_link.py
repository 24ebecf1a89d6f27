"""A card behind a slower link than its own: what a consumer's slot would make of the same copies.

For measurements only. `MOE_LOCAL_LINK_LIMIT=25GB` holds copies of experts to so many bytes a second: behind
each, the copy stream spins for the time that the slower link would have taken longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from moe_local.cache.keys import parse_bytes
from moe_local.offload.plan.bandwidth import Bandwidths
from moe_local.offload.tiers.device import CudaDevice

VARIABLE = "MOE_LOCAL_LINK_LIMIT"
SAMPLE_BYTES = 64 << 20
SAMPLE_CYCLES = 20_000_000


def link_limit() -> int | None:
    """Bytes a second that copies are held to; None: to nothing. Raises OptionError for nonsense."""
    text = os.environ.get(VARIABLE)
    return parse_bytes(text, VARIABLE) if text else None


def held(speeds: Bandwidths) -> Bandwidths:
    """The bandwidths of this machine as they are with the limit, if there is one."""
    limit = link_limit()
    return speeds if limit is None else replace(speeds, h2d=min(speeds.h2d, float(limit)))


def cuda_device(torch_device: torch.device) -> CudaDevice:
    """The card, behind a slower link where one is asked for."""
    limit = link_limit()
    return CudaDevice(torch_device) if limit is None else SlowLink(torch_device, limit)


class SlowLink(CudaDevice):
    """Copies take as long as with `bytes_per_s`, or as long as they take anyway."""

    def __init__(self, torch_device: torch.device, bytes_per_s: float) -> None:
        """Measures the card's own link and clock, which takes some milliseconds."""
        super().__init__(torch_device)
        here = torch.empty(SAMPLE_BYTES, dtype=torch.uint8, pin_memory=True)
        there = self.allocate(SAMPLE_BYTES)
        copy_s = min(self._seconds(lambda: there.copy_(here, non_blocking=True)) for _ in range(5))
        cycle_s = min(self._seconds(lambda: torch.cuda._sleep(SAMPLE_CYCLES)) for _ in range(3))
        self._cycles_per_byte = spin_cycles(1 / bytes_per_s, copy_s / SAMPLE_BYTES, cycle_s / SAMPLE_CYCLES)

    def _transfer(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        super()._transfer(destination, source)
        cycles = int(self._cycles_per_byte * source.numel())
        if cycles:
            torch.cuda._sleep(cycles)

    def _seconds(self, work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._copy_stream):
            begin.record(self._copy_stream)
            work()
            end.record(self._copy_stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def spin_cycles(wanted_s: float, own_s: float, cycle_s: float) -> float:
    """Cycles to spin for a byte that is to take `wanted_s` and takes `own_s` by itself."""
    return max(0.0, wanted_s - own_s) / cycle_s
