"""Launching the grouped kernels (see `triton_experts.py`) for experts of one layout and gate."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch

from moe_local.offload.kernels.grouped_formats import NUMBERS, GroupedFormat, grouped_format
from moe_local.offload.kernels.triton_needs import remedy
from moe_local.offload.native.library import Gate
from moe_local.offload.quantize.layout import Layout

UNIT = 16
"""All addresses and strides are multiples of this many bytes, which a thread loads at once."""

VARIABLE = "MOE_LOCAL_TRITON"

logger = logging.getLogger(__name__)


@cache
def triton_kernels(device: torch.device) -> Any:
    """The module of kernels, or None if they do not run on this device, which is logged once.

    Triton may be absent, lack what it compiles with (a C compiler, Python's headers), or reject the GPU as
    too old. The first call compiles and runs a tiny kernel. MOE_LOCAL_TRITON=off disables Triton.
    """
    if os.environ.get(VARIABLE) == "off":
        return None
    try:
        from moe_local.offload.kernels import triton_experts

        _try_out(triton_experts, device)
    except Exception as error:  # there are many ways to fail, and a path without Triton
        reason = (str(error).splitlines() or [""])[0]
        logger.warning(
            "experts are computed one by one on %s, which is slower, since Triton does not run: %s: %s; %s",
            device,
            type(error).__name__,
            reason,
            remedy(error),
        )
        return None
    return triton_experts


def can_shuffle(device: torch.device) -> bool:
    """Whether kernels may use warp shuffles, which are written in NVIDIA's assembly language."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and torch.version.cuda is not None and not interpreted


def _try_out(kernels: Any, device: torch.device) -> None:
    outputs = torch.tensor([[1.0], [2.0]], device=device)
    combined = torch.empty(1, 1, device=device)
    _combine(kernels, outputs, torch.tensor([[3.0, 4.0]], device=device), combined)
    if combined.item() != 11:
        raise RuntimeError(f"1 * 3 + 2 * 4 was {combined.item()}")


class Launcher:
    """Launches the three kernels for experts whose buffers have one layout and that have one gate function.

    T tokens, K experts per token, D model width, F expert width. `table` is int64 [G, 1 + n], one row per
    expert: its slot, which starts `slot * stride` bytes after `base`, and the places (token * K + rank) of
    its one to n tokens, padded with -1; n is 1, 2, 4 or 8. All tensors are contiguous and on one device;
    launches go to its current stream, and nothing waits.
    """

    def __init__(
        self,
        kernels: Any,
        layout: Layout,
        gate: Gate,
        *,
        has_gate: bool,
        has_bias: bool,
        shuffles: bool = False,
    ) -> None:
        """`layout` must be `served`. `shuffles`: see triton_formats.level; on NVIDIA's GPUs only."""
        form = grouped_format(layout)
        assert form is not None
        self.layout = layout
        self._format = form
        first = "gate_up_proj" if has_gate else "up_proj"
        shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
        self.width, self.hidden = shapes["down_proj"]
        self._kernels = kernels
        self._up = _constants(form, layout, first, self.hidden, shapes[first][1], has_bias) | {
            "ARRANGEMENT": gate.arrangement,
            "FUNCTION": gate.function,
            "ALPHA": gate.alpha,
            "LIMIT": gate.limit,
            "SHUFFLES": shuffles,
        }
        self._down = _constants(form, layout, "down_proj", self.width, self.hidden, has_bias) | {
            "SHUFFLES": shuffles
        }
        self._rows_a_feature = 2 if has_gate else 1

    @staticmethod
    def served(layout: Layout) -> bool:
        """Whether the kernels read matrices of this layout."""
        return grouped_format(layout) is not None

    def planes(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] as planes, float32 [T, P, D / P], P weights per word: number c is at [c % P, c // P]."""
        width = self._format.per_word
        planes = torch.empty(x.shape[0], width, x.shape[1] // width, dtype=torch.float32, device=x.device)
        return planes.copy_(x.view(x.shape[0], -1, width).transpose(1, 2))

    def up(
        self,
        base: torch.Tensor,
        stride: int,
        table: torch.Tensor,
        planes: torch.Tensor,
        hidden: torch.Tensor,
        top_k: int,
    ) -> None:
        """Set hidden[place], float32 [T * K, F] as planes, to gate(up matrix times x[token])."""
        tokens = table.shape[1] - 1
        features = rows_of_a_program(tokens) // self._rows_a_feature
        with torch.cuda.device_of(base):
            self._kernels.up_kernel[(self.hidden // features, len(table))](
                base,
                stride,
                table,
                planes,
                hidden,
                *self._format.tables(base.device),
                self._format.per_word,
                TOP_K=top_k,
                TOKENS=tokens,
                FEATURES=features,
                PLANES=planes_of_a_step(self._format.per_word, tokens),
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
        """Set outputs[place], float32 [T * K, D], to the expert's answer for its token."""
        tokens = table.shape[1] - 1
        features = rows_of_a_program(tokens)
        with torch.cuda.device_of(base):
            self._kernels.down_kernel[(self.width // features, len(table))](
                base,
                stride,
                table,
                hidden,
                outputs,
                *self._format.tables(base.device),
                self._format.per_word,
                TOKENS=tokens,
                FEATURES=features,
                PLANES=planes_of_a_step(self._format.per_word, tokens),
                enable_fp_fusion=True,
                **self._down,
            )

    def combine(self, outputs: torch.Tensor, weights: torch.Tensor, combined: torch.Tensor) -> None:
        """Set combined [T, D] to the sum over rank, in order, of weights [T, K] * outputs [T * K, D]."""
        _combine(self._kernels, outputs, weights, combined)


def rows_of_a_program(tokens: int) -> int:
    """How many rows a program multiplies with so many tokens: as many as stay in registers on every GPU."""
    return 4 if tokens <= 2 else 2


def planes_of_a_step(planes: int, tokens: int) -> int:
    """How many of a vector's `planes` a program reads, for so many tokens, before it multiplies.

    16 loads of 16 bytes in total: ptxas hoists all loads that it sees, and with 32 or 128 of them it may run
    out of registers (docs/log.md). Formats of four planes never did.
    """
    return planes if planes <= 4 else min(planes, 16 // tokens)


def pieces_of_a_step(pieces: int) -> int:
    """How many of a row's pieces are read at a time, one per thread: the number that leaves the fewest
    threads idle at the end of the row and, of equal ones, the largest."""
    return min((128, 64, 32), key=lambda threads: -(-pieces // threads) * threads)


def _constants(
    form: GroupedFormat, layout: Layout, name: str, width: int, cols: int, has_bias: bool
) -> dict[str, Any]:
    """A kernel's compile-time constants. A layout has two kernels, each compiled for up to four numbers of
    tokens."""
    pieces = pieces_of_a_step(cols // form.piece)
    bias = next(layout.parts(f"{name}_bias")) if has_bias else None
    return form.constants(layout, name) | {
        "WIDTH": width,
        "COLS": cols,
        "FORMAT": form.number,
        "PER_WORD": form.per_word,
        "BIAS": -1 if bias is None else bias.offset,
        "BIAS_KIND": NUMBERS["float32" if bias is None else bias.dtype],
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
