"""Launching the kernels that look up experts and fetch absent ones from RAM; see `triton_fetch.py`."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, Protocol

import torch

from moe_local.offload.kernels.launcher import UNIT, triton_kernels

LOG_HEAD = 4
"""How many numbers precede the ids in a layer's log."""

BLOCK, WARPS = 2048, 4
"""How many words of 4 bytes a program reads at a time, and its number of warps: 64 bytes per thread, in four
loads."""

PROGRAMS = 32
"""Programs per expert. With a single expert, 256 KiB are in flight, several times the product of a link's
bandwidth and latency (25 to 60 GB/s, one or two microseconds)."""


class LayerTables(NamedTuple):
    """One layer's part of the tables on the device, named as in `triton_fetch`; views, int64, contiguous."""

    slot_of: torch.Tensor
    expert_in: torch.Tensor
    used: torch.Tensor
    offsets: torch.Tensor
    sources: torch.Tensor
    order: torch.Tensor
    clock: torch.Tensor
    log: torch.Tensor


class Fetch(Protocol):
    """Looks up a layer's experts and fetches absent ones, on the device's current stream; nothing waits."""

    def look_up(self, tables: LayerTables, ids: torch.Tensor, *, begins: bool) -> torch.Tensor:
        """ids int64 [K] -> a Launcher's table for them, int64 [K, 2]. Updates the tables and the log.

        `begins`: this is the token's first layer. The bytes of absent experts arrive only with `bring`.
        """

    def bring(self, tables: LayerTables, memory: torch.Tensor, base: torch.Tensor, nbytes: int) -> None:
        """Copy experts that `look_up` found absent, `nbytes` each, from `memory` in RAM, uint8, to their
        slots.

        `base` is the layer's first slot, from which the offsets of the others count."""


class TritonFetch:
    """The two Triton kernels."""

    def __init__(self, kernels: Any, *, timed: bool) -> None:
        """`timed`: the log gets times of the GPU's clock, which Triton's interpreter does not have."""
        self._kernels = kernels
        self._timed = timed

    def look_up(self, tables: LayerTables, ids: torch.Tensor, *, begins: bool) -> torch.Tensor:
        top_k, listed = len(ids), len(tables.order) - 1
        found = torch.empty(top_k, 2, dtype=torch.int64, device=ids.device)
        with torch.cuda.device_of(ids):
            self._kernels.look_up_kernel[(1,)](
                ids,
                tables.slot_of,
                tables.expert_in,
                tables.used,
                tables.offsets,
                tables.order,
                tables.clock,
                tables.log,
                found,
                TOP_K=top_k,
                LISTED=listed,
                RANKS=_power_of_two(top_k),
                PLACES=_power_of_two(listed),
                BEGINS=begins,
                TIMED=self._timed,
                enable_fp_fusion=True,
                num_warps=1,
            )
        return found

    def bring(self, tables: LayerTables, memory: torch.Tensor, base: torch.Tensor, nbytes: int) -> None:
        top_k = (len(tables.log) - LOG_HEAD) // 2
        with torch.cuda.device_of(base):
            self._kernels.fetch_kernel[(PROGRAMS, top_k)](
                memory,
                base,
                tables.offsets,
                tables.sources,
                tables.log,
                TOP_K=top_k,
                UNIT=UNIT,
                WORDS=nbytes // 4,
                BLOCK=BLOCK,
                PROGRAMS=PROGRAMS,
                TIMED=self._timed,
                enable_fp_fusion=True,
                num_warps=WARPS,
            )


def fetch_kernels(device: torch.device) -> Fetch | None:
    """The Fetch for this device, or None if Triton does not run on it."""
    if triton_kernels(device) is None:
        return None
    from moe_local.offload.kernels import triton_fetch

    return TritonFetch(triton_fetch, timed=os.environ.get("TRITON_INTERPRET") != "1")


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
