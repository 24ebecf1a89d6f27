"""Few tokens through a layer whose experts are all permanently in CPU memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from moe_local.offload.kernels.cpu import check_width, rounding
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native.library import DTYPES, Expert, Gate, check, loaded_library
from moe_local.offload.system.threads import kernel_threads


class CpuTable:
    """A table of all experts of a layer, of one layout; the library looks up and counts those of tokens.

    Holds addresses in the buffers, which the caller must keep.
    """

    def __init__(self, experts: Sequence[Expert], gate: Gate, activations: str, counts: torch.Tensor) -> None:
        """`counts` int64 [E] in CPU memory: how many tokens chose each expert; `run` adds to it."""
        self._experts = list(experts)
        self._table = (ctypes.c_void_p * len(experts))(*map(ctypes.addressof, self._experts))
        self._gate = gate
        self._activations = activations
        self._counts = counts

    def struct(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """(experts, count, gate, chosen, of_experts) of a WholeLayer for inputs of `dtype`; the table has to
        outlive them."""
        table = ctypes.cast(self._table, ctypes.c_void_p)
        gate, counts = ctypes.pointer(self._gate), self._counts.data_ptr()
        return table, len(self._experts), gate, counts, rounding(self._activations, dtype)

    def run(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, D], index [T, K] int64 and weights [T, K] -> [T, D]; the same bits as by a CpuStep.

        Raises MoeLocalError for an expert that is chosen twice for a token.
        """
        check_width(x, self._experts[0].up)
        x, index, weights = x.contiguous(), index.contiguous(), weights.float().contiguous()
        combined = torch.empty_like(x)
        status = loaded_library().moe_chosen_experts(
            self._table,
            len(self._experts),
            index.data_ptr(),
            weights.data_ptr(),
            index.shape[1],
            ctypes.byref(self._gate),
            x.data_ptr(),
            x.shape[0],
            self._counts.data_ptr(),
            combined.data_ptr(),
            DTYPES[x.dtype],
            rounding(self._activations, x.dtype),
            kernel_threads(),
        )
        if status:
            for ids in index.tolist():
                Routing(ids, 1, len(self._experts))  # a clearer error for a bad choice
        check(status)
        return combined
