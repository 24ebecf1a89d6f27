"""The formats that the grouped GPU kernels read: which layouts they serve, and a kernel's compile-time
constants.

This is the host's half of the interface; the GPU's half is `triton_formats.py`. The numbers here repeat its
constants, since it cannot be imported without Triton. A new format must be added to FORMATS.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any, Protocol

import torch

from moe_local.offload.quantize import fp8, int8, mxfp4, nf4, nvfp4
from moe_local.offload.quantize.code_tables import dynamic_map, nf4_levels
from moe_local.offload.quantize.layout import Layout, Segment, TensorSpec
from moe_local.offload.quantize.low_blocks import Q2, Q3, STEPS, LowFormat

NUMBERS = {"float32": 1, "bfloat16": 2, "float16": 3, "uint8": 4}
"""Numbers for the dtypes of scales and biases, as in triton_formats (SCALES). uint8 stands for exponents
(E8M0)."""

KINDS = {"nested": 0, **NUMBERS, nvfp4.FACTOR: 5, nvfp4.DIVISOR: 6}
"""Those of all kinds of scales."""

WORDS = 4
"""How many words of 32 bits a thread reads at once: a piece."""


class GroupedFormat(Protocol):
    """One way to store weights in words of 32 bits."""

    number: int
    """The format's number in triton_formats (FORMAT)."""
    per_word: int
    """How many weights a word of 32 bits holds."""

    @property
    def piece(self) -> int:
        """How many weights a thread reads at once."""

    def serves(self, layout: Layout) -> bool:
        """Whether the kernels read all matrices of this layout: rows must be made of whole pieces, and except
        in NVFP4 no block of weights that share a scale may end within a piece."""

    def constants(self, layout: Layout, name: str) -> dict[str, Any]:
        """Compile-time constants: offsets of the parts of matrix `name`, and how many rows and columns share
        a scale."""

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The levels that `packed` and `weight` of triton_formats look up, and the map of 256 scales that
        `scale` does, as floats. Arbitrary for formats that do not use them."""


class _Words:
    """What the formats have in common."""

    per_word: int

    @property
    def piece(self) -> int:
        return WORDS * self.per_word

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return nf4_levels(device), dynamic_map(device)


class NF4Words(_Words):
    number, per_word = 0, 8

    def serves(self, layout: Layout) -> bool:
        return layout.format == "nf4" and _all_wide(layout, nf4.BLOCK)

    def constants(self, layout: Layout, name: str) -> dict[str, Any]:
        at = _offsets(layout, name)
        return {
            "Q": at["q"],
            "SCALES": KINDS["nested"],
            "SCALE": at["absmax"],
            "SCALE_OF_SCALE": at["absmax_scale"],
            "OFFSET": at["offset"],
            "BLOCK_ROWS": 1,
            "BLOCK_COLS": nf4.BLOCK,
        }


class Int8Words(_Words):
    number, per_word = 1, 4

    def serves(self, layout: Layout) -> bool:
        return layout.format == "int8" and _all_wide(layout, self.piece)

    def constants(self, layout: Layout, name: str) -> dict[str, Any]:
        return plain_scales(layout, name, 1, int8.BLOCK)


class LowWords(_Words):
    """Q3 and Q2: a word is half a block of Q3 or a whole block of Q2; SCALE is the scale of the row."""

    def __init__(self, number: int, format: LowFormat) -> None:
        self.number, self.per_word = number, 16
        self._format = format

    def serves(self, layout: Layout) -> bool:
        return layout.format == self._format.name and _all_wide(layout, self.piece)

    def constants(self, layout: Layout, name: str) -> dict[str, Any]:
        at = _offsets(layout, name)
        cols = next(tensor.shape[1] for tensor in layout.tensors if tensor.name == name)
        return {
            "Q": at["q"],
            "SCALES": KINDS["float32"],
            "SCALE": at["row_scale"],
            "SCALE_OF_SCALE": at["scale"],
            "OFFSET": -1,
            "BLOCK_ROWS": 1,
            "BLOCK_COLS": cols,
        }

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return _low_table(self._format, device), dynamic_map(device)


@cache
def _low_table(format: LowFormat, device: torch.device) -> torch.Tensor:
    """Levels, padded to eight, then 16 steps and 16 zeros. Never freed, since CUDA graphs read them."""
    levels = [float(level) for level in format.levels]
    table = [*levels, *[0.0] * (8 - len(levels)), *STEPS, *format.zeros]
    return torch.tensor(table, dtype=torch.float32, device=device)


class _E2M1Words(_Words):
    number, per_word = 4, 8

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return mxfp4.numbers(device), dynamic_map(device)


class MXFP4Words(_E2M1Words):
    """The codec's MXFP4, and that of gpt-oss as published."""

    def serves(self, layout: Layout) -> bool:
        return (
            layout.format == "mxfp4"
            and _all_wide(layout, mxfp4.BLOCK)
            and _all_have(layout, "uint8", ("uint8",))
        )

    def constants(self, layout: Layout, name: str) -> dict[str, Any]:
        return plain_scales(layout, name, 1, mxfp4.BLOCK)


class NVFP4Words(_E2M1Words):
    """NVFP4 as published: a piece has two blocks; SCALE_OF_SCALE is the second scale of BLOCK_ROWS rows."""

    def serves(self, layout: Layout) -> bool:
        return (
            layout.format == "nvfp4"
            and _all_wide(layout, self.piece)
            and _all_have(layout, "uint8", ("float8_e4m3fn",))
            and all(len(_seconds(layout, tensor.name)) == 1 for tensor in _matrices(layout))
        )

    def constants(self, layout: Layout, name: str) -> dict[str, Any]:
        (second,) = _seconds(layout, name)
        rows = next(tensor.shape[0] for tensor in layout.tensors if tensor.name == name)
        at = _offsets(layout, name)
        return {
            "Q": at["q"],
            "SCALES": KINDS[second.part],
            "SCALE": at["scale"],
            "SCALE_OF_SCALE": second.offset,
            "OFFSET": -1,
            "BLOCK_ROWS": rows // second.shape[0],
            "BLOCK_COLS": nvfp4.BLOCK,
        }


class FP8Words(_Words):
    """The codec's FP8, and that of DeepSeek and similar: scales of any dtype for blocks of any size."""

    number, per_word = 5, 4

    def serves(self, layout: Layout) -> bool:
        return (
            layout.format == "fp8"
            and _all_wide(layout, self.piece)
            and _all_have(layout, "float8_e4m3fn", NUMBERS)
            and all(self._block(layout, tensor)[1] % self.piece == 0 for tensor in _matrices(layout))
        )

    def constants(self, layout: Layout, name: str) -> dict[str, Any]:
        tensor = next(tensor for tensor in layout.tensors if tensor.name == name)
        return plain_scales(layout, name, *self._block(layout, tensor))

    def _block(self, layout: Layout, tensor: TensorSpec) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        scale = next(part for part in layout.parts(tensor.name) if part.part == "scale")
        rows, cols = map(fp8.block_size, tensor.shape, scale.shape)
        return rows, cols


def plain_scales(layout: Layout, name: str, rows: int, cols: int) -> dict[str, Any]:
    """Constants of a matrix with parts "q" and "scale", which has one number per block of rows x cols."""
    at = _offsets(layout, name)
    kind = next(part.dtype for part in layout.parts(name) if part.part == "scale")
    return {
        "Q": at["q"],
        "SCALES": KINDS[kind],
        "SCALE": at["scale"],
        "SCALE_OF_SCALE": -1,
        "OFFSET": -1,
        "BLOCK_ROWS": rows,
        "BLOCK_COLS": cols,
    }


FORMATS: tuple[GroupedFormat, ...] = (
    *(NF4Words(), Int8Words(), LowWords(2, Q3), LowWords(3, Q2)),
    *(MXFP4Words(), NVFP4Words(), FP8Words()),
)


@cache
def grouped_format(layout: Layout) -> GroupedFormat | None:
    """The format that reads this layout, or None."""
    return next((form for form in FORMATS if form.serves(layout)), None)


def _offsets(layout: Layout, name: str) -> dict[str, int]:
    return {segment.part: segment.offset for segment in layout.parts(name)}


def _seconds(layout: Layout, name: str) -> list[Segment]:
    """The second scales of an NVFP4 matrix, which has one such segment."""
    return [segment for segment in layout.parts(name) if segment.part in nvfp4.SECONDS]


def _matrices(layout: Layout) -> list[TensorSpec]:
    return [tensor for tensor in layout.tensors if len(tensor.shape) == 2]


def _all_wide(layout: Layout, columns: int) -> bool:
    """Whether the rows of every matrix are multiples of `columns`."""
    return all(tensor.shape[1] % columns == 0 for tensor in _matrices(layout))


def _all_have(layout: Layout, numbers: str, scales: Collection[str]) -> bool:
    """Whether all matrices have parts "q" and "scale" of these dtypes; native checkpoints may mix dtypes."""
    for tensor in _matrices(layout):
        parts = {segment.part: segment.dtype for segment in layout.parts(tensor.name)}
        if parts.get("q") != numbers or parts.get("scale") not in scales:
            return False
    return True
