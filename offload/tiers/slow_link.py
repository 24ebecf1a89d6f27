"""Simulates a slower link to the card, such as that of a consumer's slot.

For measurements only. `MOE_LOCAL_LINK_LIMIT=25GB` limits copies of experts to so many bytes per second: after
each copy, the copy stream spins for the additional time that the slower link would have taken.
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
    """The limit in bytes per second; None: there is none. Raises OptionError for invalid values."""
    text = os.environ.get(VARIABLE)
    return parse_bytes(text, VARIABLE) if text else None


def held(speeds: Bandwidths) -> Bandwidths:
    """This machine's bandwidths with the limit applied, if there is one."""
    limit = link_limit()
    return speeds if limit is None else replace(speeds, h2d=min(speeds.h2d, float(limit)))


def cuda_device(torch_device: torch.device) -> CudaDevice:
    """The card, behind a slower link if a limit is set."""
    limit = link_limit()
    return CudaDevice(torch_device) if limit is None else SlowLink(torch_device, limit)


class SlowLink(CudaDevice):
    """A card whose copies take at least as long as with `bytes_per_s`."""

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
    """Cycles to spin per byte, which should take `wanted_s` and by itself takes `own_s`."""
    return max(0.0, wanted_s - own_s) / cycle_s
