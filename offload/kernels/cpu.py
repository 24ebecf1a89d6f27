"""Experts and matrices in CPU memory through the C++ library, read in place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_local.offload.kernels.contracts import Answers, ExpertMath, LayerStep, Readable, Rest
from moe_local.offload.kernels.gates import recognize
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native.library import (
    BF16,
    DTYPES,
    FLOATS,
    FORMATS,
    INT8,
    INT16,
    PLAIN,
    SCALES,
    Expert,
    Gate,
    Matrix,
    check,
    library,
    loaded_library,
)
from moe_local.offload.quantize import nvfp4, stored
from moe_local.offload.quantize.fp8 import block_size
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.quantize.views import TORCH_DTYPES
from moe_local.offload.system.threads import kernel_threads


def serves(layout: Layout, x: torch.Tensor) -> bool:
    """Whether the library multiplies x with matrices of this layout; never under autocast, which sets
    dtypes."""
    return (
        reads(layout)
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


def reads(layout: Layout) -> bool:
    """Whether the library has code for every matrix of this layout, even if it was not compiled."""
    if layout.format in ("nf4", "int8") or layout.format in PLAIN.values():
        return True
    key = id(layout)  # `_read` keeps the layout, so no other gets its id; inspecting parts is slow
    if key not in _read:
        names = [tensor.name for tensor in layout.tensors if len(tensor.shape) == 2]
        known = layout.format in FORMATS or layout.format in stored.FORMATS
        _read[key] = (layout, known and all(matrix_format(layout, name) is not None for name in names))
    return _read[key][1]


_read: dict[int, tuple[Layout, bool]] = {}


def matrix_format(layout: Layout, name: str) -> str | None:
    """The library's name for the format of matrix `name`, or None. Matrices of native checkpoints may
    differ."""
    parts = {segment.part: segment.dtype for segment in layout.parts(name)}
    if "values" in parts:
        return PLAIN.get(TORCH_DTYPES[parts["values"]])
    if layout.format == "fp8":
        served = parts.get("q") == "float8_e4m3fn" and parts.get("scale") in SCALES
        return "fp8" if served else None
    if layout.format == "nvfp4":
        served = parts.get("q") == "uint8" and len(parts.keys() & {*nvfp4.SECONDS}) == 1
        return "nvfp4" if served and parts.get("scale") == "float8_e4m3fn" else None
    if layout.format == "mxfp4":
        return "mxfp4" if parts.get("q") == parts.get("scale") == "uint8" else None
    return layout.format if layout.format in FORMATS else None


def rounding(activations: str, dtype: torch.dtype) -> int:
    """How activations of this dtype enter a product.

    Integers of 16 bits in blocks of 64 keep more precision than a bf16 or fp16 vector has, at half the cost
    of floats; fp32 stays as it is. Many tokens of a bf16 model are multiplied with plain and FP8 weights in
    bf16 if the CPU can.
    """
    if activations == "int8":
        return INT8
    return {torch.float32: FLOATS, torch.float16: INT16, torch.bfloat16: BF16}[dtype]


def matrix_at(address: int, layout: Layout, name: str, has_bias: bool) -> Matrix:
    """Matrix `name` of the expert whose flat buffer starts at `address`."""
    rows, cols = next(tensor.shape for tensor in layout.tensors if tensor.name == name)
    parts = {segment.part: address + segment.offset for segment in layout.parts(name)}
    format = matrix_format(layout, name)
    assert format is not None
    matrix = Matrix(format=FORMATS[format], rows=rows, cols=cols)
    matrix.q = parts["q"] if "q" in parts else parts["values"]
    matrix.scales = parts["absmax"] if layout.format == "nf4" else parts.get("scale")
    matrix.nested = parts.get("absmax_scale", parts.get("row_scale"))
    matrix.offset = parts.get("offset")
    if format == "fp8":
        scale = next(segment for segment in layout.parts(name) if segment.part == "scale")
        matrix.scale_dtype = SCALES[scale.dtype]
        matrix.block_rows, matrix.block_cols = map(block_size, (rows, cols), scale.shape)
    if format == "nvfp4":
        second = next(segment for segment in layout.parts(name) if segment.part in nvfp4.SECONDS)
        matrix.nested, matrix.divides = parts[second.part], second.part == nvfp4.DIVISOR
        matrix.block_rows = rows // second.shape[0]
    if has_bias:
        bias = next(layout.parts(f"{name}_bias"))
        matrix.bias, matrix.bias_dtype = address + bias.offset, DTYPES[TORCH_DTYPES[bias.dtype]]
    return matrix


def plain_matrix(weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
    """An unquantized weight [rows, cols] and its bias, which must be contiguous and outlive the result."""
    rows, cols = weight.shape
    matrix = Matrix(format=FORMATS[PLAIN[weight.dtype]], rows=rows, cols=cols, q=weight.data_ptr())
    if bias is not None:
        matrix.bias, matrix.bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
    return matrix


def multiply(matrix: Matrix, x: torch.Tensor, activations: int) -> torch.Tensor:
    """x [T, cols] times the matrix, transposed, plus its bias: [T, rows], in the dtype of x."""
    check_width(x, matrix)
    x = x.contiguous()
    out = x.new_empty(x.shape[0], matrix.rows)
    status = loaded_library().moe_linear(
        ctypes.byref(matrix),
        x.data_ptr(),
        x.shape[0],
        out.data_ptr(),
        DTYPES[x.dtype],
        activations,
        kernel_threads(),
    )
    check(status)
    return out


def check_width(x: torch.Tensor, matrix: Matrix) -> None:
    """Raise RuntimeError, as torch does, unless x is as wide as the matrix; the library cannot check that."""
    if x.shape[-1] != matrix.cols:
        raise RuntimeError(f"inputs have {x.shape[-1]} numbers where the weights take {matrix.cols}")


def cpu_linear(
    buffer: torch.Tensor, layout: Layout, has_bias: bool, activations: str
) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """A linear function over the matrices of an expert whose buffer is in CPU memory."""
    matrices = {
        tensor.name: matrix_at(buffer.data_ptr(), layout, tensor.name, has_bias)
        for tensor in layout.tensors
        if len(tensor.shape) == 2
    }

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return multiply(matrices[name], x, rounding(activations, x.dtype))

    return linear


class CpuExperts:
    """Computes all experts of a group in one call of the library, if it has the model's gate function."""

    def __init__(self, activations: str) -> None:
        self._activations = activations
        self._gates: dict[ExpertMath, Gate | None] = {}
        self._experts: dict[int, tuple[Layout, Expert]] = {}

    def serves(self, math: ExpertMath, x: torch.Tensor, layout: Layout) -> bool:
        """Whether `begin` and `answers` may be called for this layer and input."""
        if not serves(layout, x):
            return False
        if math not in self._gates:
            self._gates[math] = recognize(math)
        return self._gates[math] is not None

    def begin(
        self,
        math: ExpertMath,
        x: torch.Tensor,
        routing: Routing,
        weights: torch.Tensor,
        layout: Layout,
        rest: Rest,
    ) -> CpuStep:
        """A LayerStep; see LayerKernels.begin. `rest` computes experts of layouts that are not served."""
        return CpuStep(self._calls(math, x, routing, layout), weights, rest)

    def answers(
        self, math: ExpertMath, x: torch.Tensor, routing: Routing, layout: Layout, rest: Answers
    ) -> CpuAnswers:
        """Answers; see LayerKernels.answers and `begin`."""
        return CpuAnswers(self._calls(math, x, routing, layout), rest)

    def _calls(self, math: ExpertMath, x: torch.Tensor, routing: Routing, layout: Layout) -> CpuCalls:
        return CpuCalls(self, math, self.gate(math), x, routing, layout, rounding(self._activations, x.dtype))

    def expert(self, buffer: torch.Tensor, layout: Layout, math: ExpertMath) -> Expert:
        """The expert in a slot, cached by the slot's address; so an instance serves only one store."""
        address = buffer.data_ptr()
        known = self._experts.get(address)
        if known is not None and known[0] is layout:
            return known[1]
        up = matrix_at(address, layout, "gate_up_proj" if math.has_gate else "up_proj", math.has_bias)
        expert = Expert(up, matrix_at(address, layout, "down_proj", math.has_bias))
        self._experts[address] = (layout, expert)
        return expert

    def gate(self, math: ExpertMath) -> Gate:
        """The library's gate for a layer that `serves` accepted."""
        gate = self._gates[math]
        assert gate is not None
        return gate


class CpuCalls:
    """Calls of the library for one input, each with experts of one layout."""

    def __init__(
        self,
        experts: CpuExperts,
        math: ExpertMath,
        gate: Gate,
        x: torch.Tensor,
        routing: Routing,
        layout: Layout,
        activations: int,
    ) -> None:
        """`layout` must be one that the library serves."""
        self._experts = experts
        self._layout = layout
        self._math = math
        self._gate = gate
        self.x = x if x.is_contiguous() else x.contiguous()
        self.routing = routing
        self._activations = activations

    def split(self, group: Sequence[Readable]) -> list[tuple[Sequence[Readable], bool]]:
        """The group split by layout, each part with whether the library has kernels for it."""
        if all(readable.layout is self._layout for readable in group):
            return [(group, True)]
        parts: dict[int, list[Readable]] = {}
        for readable in group:
            parts.setdefault(id(readable.layout), []).append(readable)
        return [(part, serves(part[0].layout, self.x)) for part in parts.values()]

    def run(
        self,
        group: Sequence[Readable],
        starts: Sequence[int],
        tokens: Any,
        rows: Any,
        out: torch.Tensor,
        weights: torch.Tensor | None = None,
        combined: torch.Tensor | None = None,
    ) -> None:
        """Compute a group's experts: answer i is for row tokens[i] of x and goes to row rows[i] of `out`,
        fp32. With `weights` [T, K], fp32, `out` has all places as rows, and their weighted sums go to
        `combined` [T, D].

        `starts` says where each expert's answers start. `tokens` and `rows` are int64 arrays, given as
        addresses or ctypes arrays.
        """
        structs = [self._experts.expert(r.buffer, r.layout, self._math) for r in group]
        check_width(self.x, structs[0].up)
        status = loaded_library().moe_experts(
            (ctypes.c_void_p * len(group))(*map(ctypes.addressof, structs)),
            len(group),
            (ctypes.c_int64 * len(starts))(*starts),
            tokens,
            rows,
            ctypes.byref(self._gate),
            self.x.data_ptr(),
            self.x.shape[0],
            out.data_ptr(),
            None if weights is None else weights.data_ptr(),
            self.routing.top_k,
            None if combined is None else combined.data_ptr(),
            DTYPES[self.x.dtype],
            self._activations,
            kernel_threads(),
        )
        check(status)


class CpuAnswers:
    """Computes some experts' answers for one input, in one call of the library per layout."""

    def __init__(self, calls: CpuCalls, rest: Answers) -> None:
        self._calls = calls
        self._rest = rest

    def compute(self, group: Sequence[Readable], out: torch.Tensor) -> torch.Tensor:
        found, start = [], 0
        for part, served in self._calls.split(group):
            places = self._served(part, out[start:]) if served else self._rest.compute(part, out[start:])
            found.append(places)
            start += len(places)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _served(self, group: Sequence[Readable], out: torch.Tensor) -> torch.Tensor:
        routing = self._calls.routing
        starts, places = routing.places_of(readable.expert for readable in group)
        tokens, rows = places.div(routing.top_k, rounding_mode="floor"), torch.arange(len(places))
        self._calls.run(group, starts, tokens.data_ptr(), rows.data_ptr(), out)
        return places


class CpuStep:
    """A LayerStep with one call of the library per layout in a group; the last call also computes the sum."""

    def __init__(self, calls: CpuCalls, weights: torch.Tensor, rest: Rest) -> None:
        x, routing = calls.x, calls.routing
        self._calls = calls
        self._rest = rest
        self._rest_step: LayerStep | None = None
        self._routing = routing
        self._weights = weights if weights.dtype is torch.float32 else weights.float()
        if not self._weights.is_contiguous():
            self._weights = self._weights.contiguous()
        self._outputs = torch.empty(len(routing.ids), x.shape[1], dtype=torch.float32)
        self._combined = torch.empty_like(x)
        self._left = len(routing.ids)
        self._summed = False

    def compute(self, group: Sequence[Readable]) -> None:
        for part, served in self._calls.split(group):
            if served:
                self._compute(part)
            else:
                self._rest_step = self._rest_step or self._rest(self._outputs)
                self._rest_step.compute(part)
                self._left -= sum(self._routing.tokens_of(readable.expert) for readable in part)

    def _compute(self, group: Sequence[Readable]) -> None:
        experts, routing = [readable.expert for readable in group], self._routing
        if routing.tokens == 1:
            numbers = ctypes.c_int64 * len(experts)
            starts: Sequence[int] = range(len(experts) + 1)
            self._run(group, starts, numbers(), numbers(*map(routing.ids.index, experts)))
            return
        starts, places = routing.places_of(experts)
        tokens = places.div(routing.top_k, rounding_mode="floor")
        self._run(group, starts, tokens.data_ptr(), places.data_ptr())

    def _run(self, group: Sequence[Readable], starts: Sequence[int], tokens: Any, places: Any) -> None:
        self._left -= starts[-1]
        self._summed = self._left == 0
        weights, combined = (self._weights, self._combined) if self._summed else (None, None)
        self._calls.run(group, starts, tokens, places, self._outputs, weights, combined)

    def accept(self, places: torch.Tensor, answers: torch.Tensor) -> None:
        self._outputs.index_copy_(0, places, answers)
        self._left -= len(places)

    def result(self) -> torch.Tensor:
        if not self._summed and len(self._routing.ids) > self._left == 0:
            tokens, top_k = self._weights.shape
            sums = torch.empty(tokens, self._outputs.shape[1], dtype=torch.float32)
            status = loaded_library().moe_combine(
                self._outputs.data_ptr(),
                self._weights.data_ptr(),
                tokens,
                top_k,
                self._outputs.shape[1],
                sums.data_ptr(),
            )
            check(status)
            self._combined.copy_(sums)
            self._summed = True
        return self._combined
