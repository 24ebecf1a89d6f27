"""Experts and matrices in CPU memory through the C++ library, read in place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_local.offload.kernels.contracts import ExpertMath, Readable
from moe_local.offload.kernels.gates import recognize
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native.library import (
    BF16,
    FLOATS,
    FORMATS,
    INT8,
    INT16,
    Expert,
    Gate,
    Matrix,
    check,
    library,
)
from moe_local.offload.quantize.layout import Layout
from moe_local.offload.threads import kernel_threads


def serves(layout: Layout, x: torch.Tensor) -> bool:
    """Whether the library multiplies x with matrices of this layout. Autocast has its own ideas of dtypes."""
    return (
        layout.format in FORMATS
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


def rounding(activations: str, dtype: torch.dtype) -> int:
    """How activations of this dtype enter a product.

    Sixteen bits in blocks of 64 keep more of a bf16 or fp16 vector than its dtype does, at half the cost
    of floats; fp32 stays as it is. Many tokens of a bf16 model are multiplied in bf16 where the CPU can.
    """
    if activations == "int8":
        return INT8
    return {torch.float32: FLOATS, torch.float16: INT16, torch.bfloat16: BF16}[dtype]


def matrix_at(address: int, layout: Layout, name: str, has_bias: bool) -> Matrix:
    """Matrix `name` of the expert whose flat buffer starts at `address`."""
    rows, cols = next(tensor.shape for tensor in layout.tensors if tensor.name == name)
    parts = {segment.part: address + segment.offset for segment in layout.parts(name)}
    bias = next(layout.parts(f"{name}_bias")).offset + address if has_bias else None
    scales = parts["absmax"] if layout.format == "nf4" else parts["scale"]
    nested, offset = parts.get("absmax_scale"), parts.get("offset")
    return Matrix(FORMATS[layout.format], 0, rows, cols, parts["q"], scales, nested, offset, bias)


def multiply(matrix: Matrix, x: torch.Tensor, activations: int) -> torch.Tensor:
    """x [T, cols] times the matrix, transposed, plus its bias: [T, rows], in the dtype of x."""
    lib = library()
    assert lib is not None
    floats = x.float().contiguous()
    out = torch.empty(x.shape[0], matrix.rows, dtype=torch.float32)  # whatever another thread's default is
    status = lib.moe_linear(
        ctypes.byref(matrix),
        floats.data_ptr(),
        x.shape[0],
        out.data_ptr(),
        activations,
        kernel_threads(),
    )
    check(status)
    return out.to(x.dtype)


def cpu_linear(
    buffer: torch.Tensor, layout: Layout, has_bias: bool, activations: str
) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """Linear over the matrices of an expert whose buffer lies in CPU memory."""
    matrices = {
        tensor.name: matrix_at(buffer.data_ptr(), layout, tensor.name, has_bias)
        for tensor in layout.tensors
        if len(tensor.shape) == 2
    }

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return multiply(matrices[name], x, rounding(activations, x.dtype))

    return linear


class CpuExperts:
    """Computes all experts of a group in one call, where the library knows what is between their matrices."""

    def __init__(self, activations: str) -> None:
        self._activations = activations
        self._gates: dict[ExpertMath, Gate | None] = {}
        self._experts: dict[int, tuple[Layout, Expert]] = {}

    def serves(self, math: ExpertMath, x: torch.Tensor, layout: Layout) -> bool:
        """Whether `begin` can be asked for this layer and input."""
        if not serves(layout, x):
            return False
        if math not in self._gates:
            self._gates[math] = recognize(math)
        return self._gates[math] is not None

    def begin(self, math: ExpertMath, x: torch.Tensor, routing: Routing, weights: torch.Tensor) -> CpuStep:
        """A LayerStep; see LayerKernels.begin."""
        return CpuStep(self.answers(math, x, routing), x, routing, weights)

    def answers(self, math: ExpertMath, x: torch.Tensor, routing: Routing) -> CpuAnswers:
        """Answers; see LayerKernels.answers."""
        gate = self._gates[math]
        assert gate is not None
        return CpuAnswers(self, math, gate, x, routing, rounding(self._activations, x.dtype))

    def expert(self, buffer: torch.Tensor, layout: Layout, math: ExpertMath) -> Expert:
        """The expert in a slot. It is remembered by the slot's address, so one instance serves one store."""
        address = buffer.data_ptr()
        known = self._experts.get(address)
        if known is not None and known[0] is layout:
            return known[1]
        up = matrix_at(address, layout, "gate_up_proj" if math.has_gate else "up_proj", math.has_bias)
        expert = Expert(up, matrix_at(address, layout, "down_proj", math.has_bias))
        self._experts[address] = (layout, expert)
        return expert


class CpuAnswers:
    """Computes the answers of some experts to one input, in one call of the library a group."""

    def __init__(
        self,
        experts: CpuExperts,
        math: ExpertMath,
        gate: Gate,
        x: torch.Tensor,
        routing: Routing,
        activations: int,
    ) -> None:
        self._experts = experts
        self._math = math
        self._gate = gate
        self._x = x.float().contiguous()
        self._routing = routing
        self._activations = activations

    def compute(self, group: Sequence[Readable], out: torch.Tensor) -> torch.Tensor:
        starts, places = self._routing.places_of(readable.expert for readable in group)
        self.run(group, starts, places, torch.arange(len(places)), out)
        return places

    def run(
        self,
        group: Sequence[Readable],
        starts: list[int],
        places: torch.Tensor,
        rows: torch.Tensor,
        out: torch.Tensor,
        weights: torch.Tensor | None = None,
        combined: torch.Tensor | None = None,
    ) -> None:
        """The answer for `places[i]` goes to row `rows[i]` of `out`; with `weights`, rows are all places,
        and their weighted sums go to `combined`."""
        lib: Any = library()
        tokens = places.div(self._routing.top_k, rounding_mode="floor")
        structs = [self._experts.expert(r.buffer, r.layout, self._math) for r in group]
        status = lib.moe_experts(
            (ctypes.c_void_p * len(group))(*map(ctypes.addressof, structs)),
            len(group),
            (ctypes.c_int64 * len(starts))(*starts),
            tokens.data_ptr(),
            rows.data_ptr(),
            ctypes.byref(self._gate),
            self._x.data_ptr(),
            self._x.shape[0],
            out.data_ptr(),
            None if weights is None else weights.data_ptr(),
            self._routing.top_k,
            None if combined is None else combined.data_ptr(),
            self._activations,
            kernel_threads(),
        )
        check(status)


class CpuStep:
    """A LayerStep in one call of the library a group; the last group's call sums up, too."""

    def __init__(self, answers: CpuAnswers, x: torch.Tensor, routing: Routing, weights: torch.Tensor) -> None:
        self._answers = answers
        self._dtype = x.dtype
        self._routing = routing
        self._weights = weights.float().contiguous()
        self._outputs = torch.empty(len(routing.ids), x.shape[1], dtype=torch.float32)
        self._combined = torch.empty(x.shape[0], x.shape[1], dtype=torch.float32)
        self._left = len(routing.ids)
        self._summed = False

    def compute(self, group: Sequence[Readable]) -> None:
        starts, places = self._routing.places_of(readable.expert for readable in group)
        self._left -= len(places)
        self._summed = self._left == 0
        weights, combined = (self._weights, self._combined) if self._summed else (None, None)
        self._answers.run(group, starts, places, places, self._outputs, weights, combined)

    def accept(self, places: torch.Tensor, answers: torch.Tensor) -> None:
        self._outputs.index_copy_(0, places, answers)
        self._left -= len(places)

    def result(self) -> torch.Tensor:
        if not self._summed and len(self._routing.ids) > self._left == 0:
            lib: Any = library()
            tokens, top_k = self._weights.shape
            status = lib.moe_combine(
                self._outputs.data_ptr(),
                self._weights.data_ptr(),
                tokens,
                top_k,
                self._outputs.shape[1],
                self._combined.data_ptr(),
            )
            check(status)
            self._summed = True
        return self._combined.to(self._dtype)
