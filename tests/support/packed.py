"""Matrices for the C++ library made of random bytes, the weights they are, and calls with guarded outputs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from moe_local.offload.native.library import DTYPES, FORMATS, PLAIN, SCALES, Gate, Matrix, loaded_library
from moe_local.offload.native.library import Expert as ExpertStruct
from moe_local.offload.quantize.code_tables import dynamic_map
from moe_local.offload.quantize.views import TORCH_DTYPES

BLOCK, NESTED_BLOCK = 64, 256

# QLoRA (arXiv 2305.14314), appendix E.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)

UNLIKE = ("nf4", "q3", "nvfp4", "bf16")
"""Formats whose kernels have least in common; tests that change no kernel take the others among the slow."""

GUARD = 1234567.0
"""Stands before and after every output; no kernel gives it."""
MARGIN = 32


class Packed(NamedTuple):
    """A matrix as the library reads it, and as numbers."""

    struct: Matrix
    weights: torch.Tensor
    """float64 [rows, cols]."""
    bias: torch.Tensor
    """float64 [rows]; zeros where the struct has none."""
    memory: tuple[torch.Tensor, ...]
    """What the struct points to."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, cols] -> [T, rows], in float64."""
        return x.double() @ self.weights.T + self.bias


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """The relative error of `got`, in the Frobenius norm."""
    return float((got.double() - want).norm() / want.norm())


def at_odd_address(values: torch.Tensor, shift: int) -> torch.Tensor:
    """A copy whose address is a multiple of 64 plus `shift` elements' bytes."""
    size = values.element_size()
    memory = torch.full((values.numel() + 64 + shift,), 77, dtype=values.dtype)
    start = (-memory.data_ptr() % 64) // size + shift
    place = memory[start : start + values.numel()]
    place.copy_(values.flatten())
    return place


def pack(
    format: str,
    rows: int,
    cols: int,
    *,
    seed: int = 0,
    bias: bool = True,
    shift: int = 0,
    bias_dtype: torch.dtype = torch.float32,
) -> Packed:
    """A matrix [rows, cols] of random codes, its parts `shift` elements past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    added = (torch.randn(rows, generator=generator) if bias else torch.zeros(rows)).to(bias_dtype)
    makers = {
        "nf4": _nf4,
        "int8": _int8,
        "q3": _q3,
        "q2": _q2,
        "mxfp4": _mxfp4,
        "fp8": _fp8,
        "nvfp4": _nvfp4,
    }
    make = makers.get(format, partial(_plain, format))
    struct, weights, memory = make(rows, cols, generator, shift)
    kept = at_odd_address(added, shift)
    struct.bias, struct.bias_dtype = kept.data_ptr() if bias else None, DTYPES[bias_dtype]
    return Packed(struct, weights, added.double(), (*memory, kept))


def _nf4(
    rows: int, cols: int, generator: torch.Generator, shift: int
) -> tuple[Matrix, torch.Tensor, tuple[torch.Tensor, ...]]:
    numel = rows * cols
    blocks = -(-numel // BLOCK)
    nibbles = torch.randint(16, (numel + numel % 2,), generator=generator)
    q = at_odd_address((nibbles[::2] * 16 + nibbles[1::2]).to(torch.uint8), shift)
    codes = at_odd_address(torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8), shift)
    nested = torch.rand(-(-blocks // NESTED_BLOCK), generator=generator) / 50 + 0.01
    nested, offset = at_odd_address(nested, shift), at_odd_address(torch.tensor([0.07]), shift)
    scales = (
        dynamic_map(torch.device("cpu"))[codes.long()] * nested.repeat_interleave(NESTED_BLOCK)[:blocks]
        + offset
    )
    weights = LEVELS[nibbles[:numel]].double() * scales.double().repeat_interleave(BLOCK)[:numel]
    addresses = (q.data_ptr(), codes.data_ptr(), nested.data_ptr(), offset.data_ptr())
    struct = Matrix(FORMATS["nf4"], 0, rows, cols, *addresses, None)
    return struct, weights.view(rows, cols), (q, codes, nested, offset)


def _int8(
    rows: int, cols: int, generator: torch.Generator, shift: int
) -> tuple[Matrix, torch.Tensor, tuple[torch.Tensor, ...]]:
    blocks = -(-cols // BLOCK)
    numbers = torch.randint(-128, 128, (rows, cols), generator=generator, dtype=torch.int8)
    halves = (torch.rand(rows, blocks, generator=generator) / 500 + 1e-7).half()  # some of them subnormal
    q = at_odd_address(numbers, shift)
    scales = at_odd_address(halves.view(torch.uint8), shift)
    weights = numbers.double() * halves.double().repeat_interleave(BLOCK, dim=1)[:, :cols]
    struct = Matrix(FORMATS["int8"], 0, rows, cols, q.data_ptr(), scales.data_ptr(), None, None, None)
    return struct, weights, (q, scales)


def _q3(
    rows: int, cols: int, generator: torch.Generator, shift: int
) -> tuple[Matrix, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Blocks of 32 codes: words of the lower two bits of the first and second 16, and one of third bits."""
    blocks = -(-cols // 32)
    codes = torch.randint(8, (rows, blocks, 32), generator=generator)
    code = torch.arange(32)
    places = 8 * (code % 16 // 4) + 4 * (code // 16) + code % 4
    thirds = (codes >> 2 << places).sum(2, keepdim=True)
    words = torch.cat([two_bits(codes[..., :16]), two_bits(codes[..., 16:]), thirds], dim=2)
    levels = torch.tensor([0, 3, 5, 7, 9, 11, 13, 16]).double()[codes]
    return _low("q3", words, levels, 2.375, 0.75, cols, generator, shift)


def _q2(
    rows: int, cols: int, generator: torch.Generator, shift: int
) -> tuple[Matrix, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Blocks of 16 codes in a word."""
    codes = torch.randint(4, (rows, -(-cols // 16), 16), generator=generator)
    return _low("q2", two_bits(codes), codes.double(), -3 / 128, 13 / 64, cols, generator, shift)


def two_bits(codes: torch.Tensor) -> torch.Tensor:
    """[..., 16] -> words, int64 [..., 1]."""
    return ((codes & 3) << 2 * torch.arange(16)).sum(-1, keepdim=True)


def _low(
    format: str,
    words: torch.Tensor,
    levels: torch.Tensor,
    zero: float,
    zero_step: float,
    cols: int,
    generator: torch.Generator,
    shift: int,
) -> tuple[Matrix, torch.Tensor, tuple[torch.Tensor, ...]]:
    """`words` [rows, blocks, planes] and their levels [rows, blocks, n], with random scales."""
    rows, blocks, _ = words.shape
    # Little-endian bytes, plane by plane of a row.
    octets = (words.transpose(1, 2).unsqueeze(-1) >> 8 * torch.arange(4)) & 255
    q = at_odd_address(octets.to(torch.uint8), shift)
    codes = torch.randint(256, (rows, blocks), generator=generator, dtype=torch.uint8)
    scales = at_odd_address(codes, shift)
    row_scales = at_odd_address(torch.rand(rows, generator=generator) / 50 + 0.01, shift)
    octaves = torch.tensor([8.0, 10.0, 13.0]) / 256
    steps = torch.tensor([float(octaves[i % 3]) * 2 ** (i // 3) for i in range(16)]).double()
    weights = steps[(codes & 15).long()].unsqueeze(2) * (
        levels - zero - zero_step * (codes >> 4).unsqueeze(2)
    )
    weights = (weights.flatten(1) * row_scales.double().unsqueeze(1))[:, :cols]
    addresses = (q.data_ptr(), scales.data_ptr(), row_scales.data_ptr(), None, None)
    return Matrix(FORMATS[format], 0, rows, cols, *addresses), weights, (q, scales, row_scales)


def _mxfp4(
    rows: int, cols: int, generator: torch.Generator, shift: int
) -> tuple[Matrix, torch.Tensor, tuple[torch.Tensor, ...]]:
    nibbles = torch.randint(16, (rows, cols + cols % 2), generator=generator)
    exponents = torch.randint(121, 127, (rows, -(-cols // 32)), generator=generator, dtype=torch.uint8)
    q = at_odd_address((nibbles[:, ::2] + 16 * nibbles[:, 1::2]).to(torch.uint8), shift)
    scales = at_odd_address(exponents, shift)
    factors = torch.exp2(exponents.double() - 127).repeat_interleave(32, dim=1)[:, :cols]
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    numbers = sizes[nibbles[:, :cols] % 8] * (1 - nibbles[:, :cols] // 8 * 2)
    struct = Matrix(FORMATS["mxfp4"], 0, rows, cols, q.data_ptr(), scales.data_ptr(), None, None, None)
    return struct, numbers * factors, (q, scales)


def _nvfp4(
    rows: int, cols: int, generator: torch.Generator, shift: int
) -> tuple[Matrix, torch.Tensor, tuple[torch.Tensor, ...]]:
    """With one second scale, or one for each half of the rows, to multiply or to divide by."""
    nibbles = torch.randint(16, (rows, cols + cols % 2), generator=generator)
    stored = (40 + 200 * torch.rand(rows, -(-cols // 16), generator=generator)).to(torch.float8_e4m3fn)
    stored[0, 1:2] = 2.0**-8  # subnormal
    halves = 1 + (rows % 2 == 0)
    second = torch.rand(halves, generator=generator) / 5000 + 1e-4
    q = at_odd_address((nibbles[:, ::2] + 16 * nibbles[:, 1::2]).to(torch.uint8), shift)
    scales = at_odd_address(stored.view(torch.uint8), shift)
    divides = rows % 3 == 0
    seconds = at_odd_address(1 / second if divides else second, shift)
    factors = (
        stored.double() * second.double().repeat_interleave(rows // halves)[:, None]
    ).repeat_interleave(16, dim=1)[:, :cols]
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    numbers = sizes[nibbles[:, :cols] % 8] * (1 - nibbles[:, :cols] // 8 * 2)
    addresses = (q.data_ptr(), scales.data_ptr(), seconds.data_ptr(), None, None)
    struct = Matrix(FORMATS["nvfp4"], 0, rows, cols, *addresses)
    struct.block_rows, struct.divides = rows // halves, divides
    return struct, numbers * factors, (q, scales, seconds)


def _fp8(
    rows: int, cols: int, generator: torch.Generator, shift: int
) -> tuple[Matrix, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Blocks of many shapes, and scales of all dtypes."""
    numbers = 60 * torch.randn(rows, cols, generator=generator).clamp(-7, 7)
    small = torch.rand(rows, cols, generator=generator) < 1 / 16
    codes = torch.where(small, numbers / 2**14, numbers).to(torch.float8_e4m3fn)  # some of them subnormal
    codes[0, 0] = 16.0  # beside which a bias is not too large
    height, width = [(128, 128), (1, 64), (rows, cols), (3, 40)][(rows + cols) % 4]
    grid = -(-rows // height), -(-cols // width)
    name, dtype = list(SCALES.items())[(rows + shift) % 4]
    if name == "uint8":
        stored = torch.randint(118, 123, grid, generator=generator, dtype=torch.uint8)
        values = torch.exp2(stored.double() - 127)
    else:
        stored = (torch.rand(grid, generator=generator) / 500 + 1e-3).to(TORCH_DTYPES[name])
        values = stored.double()
    q, scales = (
        at_odd_address(codes.view(torch.uint8), shift),
        at_odd_address(stored.view(torch.uint8), shift),
    )
    factors = values.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :cols]
    struct = Matrix(FORMATS["fp8"], 0, rows, cols, q.data_ptr(), scales.data_ptr(), None, None, None)
    struct.bias = None
    struct.block_rows, struct.block_cols, struct.scale_dtype = height, width, dtype
    return struct, codes.double() * factors, (q, scales)


def _plain(
    format: str, rows: int, cols: int, generator: torch.Generator, shift: int
) -> tuple[Matrix, torch.Tensor, tuple[torch.Tensor, ...]]:
    dtype = next(dtype for dtype, name in PLAIN.items() if name == format)
    numbers = at_odd_address(torch.randn(rows, cols, generator=generator).to(dtype), shift)
    struct = Matrix(FORMATS[format], 0, rows, cols, numbers.data_ptr(), None, None, None, None)
    return struct, numbers.double().view(rows, cols), (numbers,)


class Guarded:
    """A float32 output [rows, cols] full of NaN, between guards."""

    def __init__(self, rows: int, cols: int, shift: int = 0) -> None:
        self._memory = torch.full((rows * cols + 2 * MARGIN + shift,), GUARD)
        self._start, self._end = MARGIN + shift, MARGIN + shift + rows * cols
        self.values = self._memory[self._start : self._end].view(rows, cols)
        self.values.fill_(float("nan"))

    def take(self) -> torch.Tensor:
        """The output, once nothing has been written beside it."""
        around = torch.cat([self._memory[: self._start], self._memory[self._end :]])
        assert (around == GUARD).all(), "written outside of the output"
        return self.values


def linear(
    packed: Packed, x: torch.Tensor, activations: int, threads: int = 1, shift: int = 0
) -> torch.Tensor:
    """moe_linear on float32 x [T, cols] -> [T, rows]; both `shift` floats past an aligned address."""
    inputs = at_odd_address(x, shift)
    out = Guarded(x.shape[0], packed.struct.rows, shift)
    status = loaded_library().moe_linear(
        ctypes.byref(packed.struct),
        inputs.data_ptr(),
        x.shape[0],
        out.values.data_ptr(),
        0,
        activations,
        threads,
    )
    assert status == 0
    return out.take()


class ExpertPair(NamedTuple):
    """Both matrices of an expert."""

    up: Packed
    down: Packed
    struct: ExpertStruct


def pack_expert(
    format: str, width: int, hidden: int, gate: Gate, *, seed: int = 0, bias: bool = True, shift: int = 0
) -> ExpertPair:
    """An expert of D = `width` and F = `hidden`."""
    first = pack(
        format, hidden * (1 if gate.arrangement == 0 else 2), width, seed=2 * seed, bias=bias, shift=shift
    )
    second = pack(format, width, hidden, seed=2 * seed + 1, bias=bias, shift=shift)
    return ExpertPair(first, second, ExpertStruct(first.struct, second.struct))


class Routed(NamedTuple):
    """What moe_experts gave: `outputs` [T * K, D], and `combined` [T, D]."""

    outputs: torch.Tensor
    combined: torch.Tensor


def run_experts(
    experts: Sequence[ExpertPair],
    ids: torch.Tensor,
    weights: torch.Tensor,
    x: torch.Tensor,
    gate: Gate,
    activations: int,
    *,
    threads: int = 1,
    groups: Sequence[Sequence[int]] | None = None,
) -> Routed:
    """moe_experts on x [T, D] routed to `ids` [T, K], one call a group of experts; the last combines."""
    tokens, top_k = ids.shape
    outputs, combined = Guarded(tokens * top_k, x.shape[1]), Guarded(tokens, x.shape[1])
    groups = groups or [range(len(experts))]
    for group in groups:
        places = [(ids.flatten() == expert).nonzero().flatten() for expert in group]
        starts = [0]
        for found in places:
            starts.append(starts[-1] + found.numel())
        flat = torch.cat([*places, torch.zeros(1, dtype=torch.int64)])  # never empty, so never null
        rows = flat // top_k
        last = group is groups[-1]
        status = loaded_library().moe_experts(
            (ctypes.c_void_p * len(group))(*(ctypes.addressof(experts[e].struct) for e in group)),
            len(group),
            (ctypes.c_int64 * len(starts))(*starts),
            rows.data_ptr(),
            flat.data_ptr(),
            ctypes.byref(gate),
            x.data_ptr(),
            tokens,
            outputs.values.data_ptr(),
            weights.data_ptr() if last else None,
            top_k,
            combined.values.data_ptr() if last else None,
            0,
            activations,
            threads,
        )
        assert status == 0
    return Routed(outputs.take(), combined.take())


def routing(tokens: int, experts: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [T, K] without repetition in a token, and weights [T, K] that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(tokens, experts, generator=generator).topk(top_k)
    return ids, weights.softmax(-1).contiguous()
