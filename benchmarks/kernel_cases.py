"""The cases that kernels.py times: products with rotating weights, by our kernels and by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import torch
from kernel_weights import (
    Copies,
    copies_beyond_cache,
    fill_int8,
    fill_low,
    fill_micro,
    fill_nf4,
    int8_layout,
    int8_weights,
)
from torch.nn import functional as F

from moe_local.offload.kernels.bnb import nf4_linear
from moe_local.offload.kernels.cpu import cpu_linear
from moe_local.offload.kernels.layer import LayerKernels
from moe_local.offload.kernels.reference import reference_linear
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native.library import ISAS
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import Layout, TensorSpec

EXPERT, NF4_MATRIX, INT8_MATRIX = "expert", "nf4 matrix", "int8 matrix"
EXPERTS = {EXPERT: "nf4"} | {f"{name} expert": name for name in ("q3", "q2", "int8", "mxfp4", "fp8")}
"""Kernels that compute whole experts, and the format of each."""

FILL = {"q3": fill_low, "q2": fill_low, "int8": fill_int8, "mxfp4": fill_micro, "fp8": fill_micro}

KERNELS = (*EXPERTS, NF4_MATRIX, INT8_MATRIX)
TORCH, BITSANDBYTES, REFERENCE = "torch fp32", "bitsandbytes", "reference"
PEERS = (TORCH, BITSANDBYTES, REFERENCE)
ACTIVATIONS = ("fp32", "bf16", "int8")
"""The dtypes of inputs; int8 means fp32 inputs that the kernel rounds."""

UP, DOWN = "gate_up_proj", "down_proj"
Call = Callable[[Sequence[int]], torch.Tensor]
"""Indices of the copies to use -> the product."""


class Swiglu:
    """An ExpertMath with Mixtral's activation."""

    has_gate, has_bias = True, False

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        return output


class Lent(NamedTuple):
    """An expert in a buffer: a Readable."""

    expert: int
    buffer: torch.Tensor
    layout: Layout


@dataclass(eq=False)
class Case:
    """A row of the table: one kernel with one number of tokens. A sample is (round, seconds, bytes/s of the
    memory read just before)."""

    kernel: str
    by: str
    activations: str
    tokens: int
    nbytes: int
    """Bytes of weights and scales that a call reads."""
    numel: int
    """How many weights a call multiplies each token with."""
    copies: int
    """How many copies of the weights the calls rotate through; each call uses `taken` of them."""
    taken: int
    call: Call
    error: float = 0.0
    """Relative error of the result against fp32, in the Frobenius norm."""
    every: int = 1
    """The case is timed in rounds whose number is a multiple of this."""
    samples: list[tuple[int, float, float]] = field(default_factory=list)
    _turn: int = 0

    @property
    def isa(self) -> str | None:
        return self.by if self.by in ISAS else None

    def next_copies(self) -> list[int]:
        turn = [(self._turn + i) % self.copies for i in range(self.taken)]
        self._turn += self.taken
        return turn

    @property
    def error_limit(self) -> float:
        """The rounding error that the kernel may add; an order of magnitude above what it does add."""
        return {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2}[self.activations]


class Bench:
    """Weights of Mixtral experts, and all cases that use them. Owns the memory, a few GB at full width."""

    def __init__(self, width: int, hidden: int, tokens: Sequence[int], experts: int) -> None:
        """`width` D and `hidden` F of an expert, multiples of 64: matrices [2F, D] and [D, F].

        A single token goes to this many `experts`; several tokens stand for the part of a batch that goes to
        one expert.
        """
        self._math, self._top_k = Swiglu(), experts
        self._tokens = tokens
        specs = [TensorSpec(UP, (2 * hidden, width)), TensorSpec(DOWN, (width, hidden))]
        self._numel = {spec.name: spec.numel for spec in specs}
        nf4, int8 = codec_for("nf4").layout(specs), int8_layout(specs[0])
        self._nf4 = Copies(nf4, nbytes_of(nf4, UP), fill_nf4, experts)
        self._int8 = Copies(int8, nbytes_of(int8, UP), fill_int8)
        self._experts = {EXPERT: self._nf4}
        for kernel in EXPERTS.keys() - {EXPERT}:
            layout = codec_for(EXPERTS[kernel]).layout(specs)
            self._experts[kernel] = Copies(layout, nbytes_of(layout, UP), FILL[EXPERTS[kernel]], experts)
        count = min(len(self._nf4.buffers), copies_beyond_cache(4 * self._numel[UP], least=experts))
        decode = codec_for("nf4").decode
        self._fp32 = [decode(buffer, self._nf4.layout, torch.float32) for buffer in self._nf4.buffers[:count]]
        # Inputs that bf16 represents exactly, so that all cases get the same numbers.
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(max(tokens), width, generator=generator).bfloat16().float()
        self._wanted = self._references()

    def cases(self, kernels: Sequence[str], isas: Sequence[str], peers: Sequence[str]) -> Iterator[Case]:
        """All cases, in the order of the table."""
        for kernel, tokens in product(kernels, self._tokens):
            for isa, activations in product(isas, ACTIVATIONS):
                if not (kernel == INT8_MATRIX and activations == "bf16"):  # the same as fp32 there
                    yield self._ours(kernel, isa, activations, tokens)
            if TORCH in peers and kernel in (EXPERT, NF4_MATRIX):
                yield self._torch(kernel, tokens)
            if tokens in (1, 16) and kernel == NF4_MATRIX and BITSANDBYTES in peers:
                yield self._bitsandbytes(tokens)
            if tokens in (1, 16) and kernel == EXPERT and REFERENCE in peers:
                yield self._reference(tokens)

    def wanted(self, case: Case) -> torch.Tensor:
        """The right result of the case with the first copies, computed in fp32."""
        return self._wanted[case.kernel, case.tokens]

    def _ours(self, kernel: str, isa: str, activations: str, tokens: int) -> Case:
        x = self._input(activations, tokens)
        mode = "int8" if activations == "int8" else "native"
        if kernel in EXPERTS:
            experts = self._experts[kernel]
            return self._case(kernel, isa, activations, tokens, experts, self._together(x, mode, experts))
        copies = self._nf4 if kernel == NF4_MATRIX else self._int8
        linears = [cpu_linear(buffer, copies.layout, False, mode) for buffer in copies.buffers]
        return self._case(kernel, isa, activations, tokens, copies, lambda turn: linears[turn[0]](x, UP))

    def _together(self, x: torch.Tensor, mode: str, experts: Copies) -> Call:
        """A layer's experts in one call: all experts of a single token, or all tokens through one expert."""
        tokens, layout, kernels = x.shape[0], experts.layout, LayerKernels(mode)
        taken = self._taken(tokens)
        weights = torch.full((tokens, taken), 1 / taken)

        def call(turn: Sequence[int]) -> torch.Tensor:
            routing = Routing(list(turn) * tokens, tokens, len(experts.buffers))
            step = kernels.begin(self._math, x, routing, weights, layout)
            step.compute([Lent(number, experts.buffers[number], layout) for number in turn])
            return step.result()

        return call

    def _torch(self, kernel: str, tokens: int) -> Case:
        """torch with weights that were dequantized beforehand."""
        x, linears = self._x[:tokens], [reference_linear(weights, False) for weights in self._fp32]

        def expert(turn: Sequence[int]) -> torch.Tensor:
            each = [linears[i](self._math.activate(linears[i](x, UP)), DOWN) for i in turn]
            return each[0] if len(each) == 1 else torch.stack(each).mean(0)

        def matrix(turn: Sequence[int]) -> torch.Tensor:
            return linears[turn[0]](x, UP)

        return self._case(kernel, TORCH, "fp32", tokens, None, expert if kernel == EXPERT else matrix)

    def _bitsandbytes(self, tokens: int) -> Case:
        x = self._input("bf16", tokens)
        linears = [nf4_linear(b, self._nf4.layout, x.dtype, False) for b in self._nf4.buffers]
        return self._case(
            NF4_MATRIX, BITSANDBYTES, "bf16", tokens, self._nf4, lambda turn: linears[turn[0]](x, UP)
        )

    def _reference(self, tokens: int) -> Case:
        """The path without the C++ library: dequantize each expert, and multiply."""
        x, layout = self._x[:tokens], self._nf4.layout

        def call(turn: Sequence[int]) -> torch.Tensor:
            total = torch.zeros_like(x)
            for number in turn:
                weights = codec_for("nf4").decode(self._nf4.buffers[number], layout, x.dtype)
                linear = reference_linear(weights, False)
                total += linear(self._math.activate(linear(x, UP)), DOWN) / len(turn)
            return total

        return self._case(EXPERT, REFERENCE, "fp32", tokens, self._nf4, call)

    def _case(
        self, kernel: str, by: str, activations: str, tokens: int, source: Copies | None, call: Call
    ) -> Case:
        """`source`: the quantized copies that a call reads; None means the dequantized copies."""
        taken = self._taken(tokens) if kernel in EXPERTS else 1
        names = (UP, DOWN) if kernel in EXPERTS else (UP,)
        numel = sum(self._numel[name] for name in names)
        if source is None:
            nbytes, copies = 4 * numel, len(self._fp32)
        else:
            nbytes = sum(nbytes_of(source.layout, name) for name in names)
            copies = len(source.buffers)
        return Case(kernel, by, activations, tokens, taken * nbytes, taken * numel, copies, taken, call)

    def _input(self, activations: str, tokens: int) -> torch.Tensor:
        return self._x[:tokens].to(torch.bfloat16 if activations == "bf16" else torch.float32)

    def _references(self) -> dict[tuple[str, int], torch.Tensor]:
        up = F.linear(self._x, self._fp32[0][UP])
        int8 = F.linear(self._x, int8_weights(self._int8.buffers[0], self._int8.layout))
        found = {}
        for tokens in self._tokens:
            found[NF4_MATRIX, tokens], found[INT8_MATRIX, tokens] = up[:tokens], int8[:tokens]
            turn = range(self._taken(tokens))
            found[EXPERT, tokens] = self._torch(EXPERT, tokens).call(turn)
        for kernel, experts in self._experts.items():
            if kernel != EXPERT:
                decode, layout = codec_for(EXPERTS[kernel]).decode, experts.layout
                each = [decode(buffer, layout, torch.float32) for buffer in experts.buffers[: self._top_k]]
                for tokens in self._tokens:
                    answers = [self._plainly(one, tokens) for one in each[: self._taken(tokens)]]
                    found[kernel, tokens] = torch.stack(answers).mean(0)
        return found

    def _plainly(self, weights: Mapping[str, torch.Tensor], tokens: int) -> torch.Tensor:
        linear = reference_linear(weights, False)
        return linear(self._math.activate(linear(self._x[:tokens], UP)), DOWN)

    def _taken(self, tokens: int) -> int:
        """How many experts a call with this many tokens uses."""
        return self._top_k if tokens == 1 else 1


def nbytes_of(layout: Layout, name: str) -> int:
    """Bytes of a matrix, scales included."""
    return sum(part.nbytes for part in layout.parts(name))
