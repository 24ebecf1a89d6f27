"""Recognizing an architecture's gate function, the step between its experts' matrices, by its results."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import product

import torch

from moe_local.offload.kernels.contracts import ExpertMath
from moe_local.offload.native.library import Gate, check, library, loaded_library

PLAIN, CONCATENATED, INTERLEAVED = range(3)
FUNCTIONS = ("identity", "relu", "relu2", "silu", "gelu", "gelu_tanh", "clamped_swiglu", "clamped_silu")
GELUS = (FUNCTIONS.index("gelu"), FUNCTIONS.index("gelu_tanh"))

WIDTH = 4096
"""How many results of a gate are compared."""


def recognize(math: ExpertMath) -> Gate | None:
    """The library's gate that computes the same as `math.activate`, or None.

    The two are compared on numbers from tiny to huge, on both sides of every clamp that is likely to act. So
    neither the activation function nor the arrangement of gate and up needs to be known by name.
    """
    if library() is None or _finishes(math):
        return None
    columns = 2 * WIDTH if math.has_gate else WIDTH
    probe = _probe(columns)
    try:
        with torch.no_grad():
            wanted = math.activate(probe.unsqueeze(0)).float().reshape(-1)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    if wanted.numel() != WIDTH:
        return None
    for gate in _candidates(math):
        if _agree(gate, probe, apply_gate(gate, probe[None])[0], wanted):
            return gate
    return None


def _finishes(math: ExpertMath) -> bool:
    """Whether an operation follows the down projection."""
    if getattr(math, "has_post_expert_norm", False):
        return True
    output = torch.ones(1, 1)
    try:
        return math.finish(output) is not output
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return True


def _agree(gate: Gate, probe: torch.Tensor, got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two results of a gate on `probe` differ by no more than the rounding of fp32.

    The gelus add 1 to numbers near -1; the error of that grows with gate and up, but the result does not.
    """
    allowed = 2e-6 * wanted.abs() + 1e-7
    if gate.function in GELUS:
        if gate.arrangement == PLAIN:
            factors = probe
        elif gate.arrangement == CONCATENATED:
            factors = probe[:WIDTH] * probe[WIDTH:]
        else:
            factors = probe[::2] * probe[1::2]
        allowed += 2e-7 * factors.abs()
    return bool(((got - wanted).abs() <= allowed).all())


def apply_gate(gate: Gate, hidden: torch.Tensor) -> torch.Tensor:
    """Apply the gate to hidden, float32 [T, F or 2F] on the CPU -> [T, F]. Needs the library."""
    hidden = hidden.contiguous()
    width = hidden.shape[1] if gate.arrangement == PLAIN else hidden.shape[1] // 2
    out = torch.empty(hidden.shape[0], width, dtype=torch.float32)
    lib = loaded_library()
    check(lib.moe_gate(ctypes.byref(gate), hidden.data_ptr(), hidden.shape[0], width, out.data_ptr()))
    return out


def _candidates(math: ExpertMath) -> Iterator[Gate]:
    *simple, swiglu, silu = range(len(FUNCTIONS))
    if not math.has_gate:
        yield from (Gate(PLAIN, function, 0.0, 0.0) for function in simple)
        return
    arrangements = (CONCATENATED, INTERLEAVED)
    yield from (Gate(a, function, 0.0, 0.0) for a, function in product(arrangements, simple))
    alpha, limit = _number(math, "alpha", "swiglu_alpha"), _number(math, "limit", "swiglu_limit")
    if limit is not None:
        yield from (Gate(a, silu, 0.0, limit) for a in arrangements)
    if alpha is not None and limit is not None:
        yield from (Gate(a, swiglu, alpha, limit) for a in arrangements)


def _number(math: ExpertMath, *names: str) -> float | None:
    """The first of these attributes that is a number, since model classes use different names."""
    values = (getattr(math, name, None) for name in names)
    return next((float(value) for value in values if isinstance(value, int | float)), None)


def _probe(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    sizes = 10 ** (7 * torch.rand(count, generator=generator, dtype=torch.float32) - 3)
    signs = 2 * torch.randint(2, (count,), generator=generator).float() - 1
    return (sizes * signs).contiguous()
