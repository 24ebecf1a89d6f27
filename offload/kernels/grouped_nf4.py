"""Launching the grouped kernels, which `triton_nf4.py` explains, for experts of one layout and gate."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from moe_local.offload.native.library import Gate
from moe_local.offload.quantize.bnb import dynamic_map, nf4_levels
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.quantize.nf4 import BLOCK

UNIT = 16
"""Bytes that every address and stride is a multiple of: what a thread loads at once."""

logger = logging.getLogger(__name__)


@cache
def triton_kernels(device: torch.device) -> Any:
    """The module of kernels, or None where they do not run on this device, which is logged once.

    Triton may be absent, or lack what it compiles with (a C compiler, Python's headers), or find the GPU too
    old. The first call waits for a tiny kernel to be compiled and run.
    """
    try:
        from moe_local.offload.kernels import triton_nf4

        _try_out(triton_nf4, device)
    except Exception as error:  # each of these fails in its own way, and there is another path
        reason = (str(error).splitlines() or [""])[0]
        logger.info("NF4 experts are computed one by one: Triton: %s: %s", type(error).__name__, reason)
        return None
    return triton_nf4


def _try_out(kernels: Any, device: torch.device) -> None:
    outputs = torch.tensor([[1.0], [2.0]], device=device)
    combined = torch.empty(1, 1, device=device)
    _combine(kernels, outputs, torch.tensor([[3.0, 4.0]], device=device), combined)
    if combined.item() != 11:
        raise RuntimeError(f"1 * 3 + 2 * 4 was {combined.item()}")


class GroupedNF4:
    """The three kernels for experts whose buffers have one layout, with one gate between their matrices.

    T tokens, K experts a token, D model width, F expert width. `table` is int64 [G, 1 + n], a row an expert:
    its slot, which starts `slot * stride` bytes behind `base`, and the places (token * K + rank) of its one
    to n tokens, then -1; n is 1, 2, 4 or 8. Everything is contiguous and on one device; launches go to its
    current stream, and nothing waits.
    """

    def __init__(self, kernels: Any, layout: Layout, gate: Gate, *, has_gate: bool, has_bias: bool) -> None:
        """`layout` must be `served`."""
        self.layout = layout
        first = "gate_up_proj" if has_gate else "up_proj"
        shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        self.width, self.hidden = shapes["down_proj"]
        self._kernels = kernels
        self._up = _constants(layout, first, self.hidden, shapes[first][1], has_bias) | {
            "ARRANGEMENT": gate.arrangement,
            "FUNCTION": gate.function,
            "ALPHA": gate.alpha,
            "LIMIT": gate.limit,
        }
        self._down = _constants(layout, "down_proj", self.width, self.hidden, has_bias)
        self._rows_a_feature = 2 if has_gate else 1

    @staticmethod
    def served(layout: Layout) -> bool:
        """Whether the kernels read matrices of this layout: in NF4, no row starting amid a block."""
        matrices = [tensor.shape for tensor in layout.tensors if len(tensor.shape) == 2]
        return layout.format == "nf4" and all(cols % BLOCK == 0 for _, cols in matrices)

    def planes(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] as the kernels want it, float32 [T, 8, D / 8]: number c at [c % 8, c // 8]."""
        planes = torch.empty(x.shape[0], 8, x.shape[1] // 8, dtype=torch.float32, device=x.device)
        return planes.copy_(x.view(x.shape[0], -1, 8).transpose(1, 2))

    def up(
        self,
        base: torch.Tensor,
        stride: int,
        table: torch.Tensor,
        planes: torch.Tensor,
        hidden: torch.Tensor,
        top_k: int,
    ) -> None:
        """hidden[place], float32 [T * K, F] in planes of its own, becomes what the gate makes of x[token]."""
        tokens = table.shape[1] - 1
        features = rows_of_a_program(tokens) // self._rows_a_feature
        with torch.cuda.device_of(base):
            self._kernels.up_kernel[(self.hidden // features, len(table))](
                base,
                stride,
                table,
                planes,
                hidden,
                nf4_levels(base.device),
                dynamic_map(base.device),
                TOP_K=top_k,
                TOKENS=tokens,
                FEATURES=features,
                enable_fp_fusion=True,
                **self._up,
            )

    def down(
        self,
        base: torch.Tensor,
        stride: int,
        table: torch.Tensor,
        hidden: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """outputs[place], float32 [T * K, D], becomes the expert's answer to its token."""
        tokens = table.shape[1] - 1
        features = rows_of_a_program(tokens)
        with torch.cuda.device_of(base):
            self._kernels.down_kernel[(self.width // features, len(table))](
                base,
                stride,
                table,
                hidden,
                outputs,
                nf4_levels(base.device),
                dynamic_map(base.device),
                TOKENS=tokens,
                FEATURES=features,
                enable_fp_fusion=True,
                **self._down,
            )

    def combine(self, outputs: torch.Tensor, weights: torch.Tensor, combined: torch.Tensor) -> None:
        """combined [T, D] becomes the sum over rank, in order, of weights [T, K] * outputs [T * K, D]."""
        _combine(self._kernels, outputs, weights, combined)


def rows_of_a_program(tokens: int) -> int:
    """Rows that a program multiplies with so many vectors: as many as stay in registers, on every GPU."""
    return 4 if tokens <= 2 else 2


def pieces_of_a_step(cols: int) -> int:
    """Pieces of 32 weights read at a time, a thread each: few left idle by a row's end, then many."""
    pieces = cols // 32
    return min((128, 64, 32), key=lambda threads: -(-pieces // threads) * threads)


def _constants(layout: Layout, name: str, width: int, cols: int, has_bias: bool) -> dict[str, Any]:
    """What a kernel is compiled for: two kernels a model, each for up to four numbers of tokens."""
    parts = {segment.part: segment.offset for segment in layout.parts(name)}
    pieces = pieces_of_a_step(cols)
    return {
        "WIDTH": width,
        "COLS": cols,
        "Q": parts["q"],
        "ABSMAX": parts["absmax"],
        "NESTED": parts["absmax_scale"],
        "OFFSET": parts["offset"],
        "BIAS": next(layout.parts(f"{name}_bias")).offset if has_bias else -1,
        "PIECES": pieces,
        "num_warps": pieces // 32,
    }


def _combine(kernels: Any, outputs: torch.Tensor, weights: torch.Tensor, combined: torch.Tensor) -> None:
    tokens, width = combined.shape
    with torch.cuda.device_of(outputs):
        kernels.combine_kernel[(-(-width // 512), tokens)](
            outputs,
            weights,
            combined,
            TOP_K=weights.shape[1],
            WIDTH=width,
            COLUMNS=512,
            enable_fp_fusion=True,
            num_warps=4,
        )
