"""A layer's experts in one call of the library against expert after expert with torch around each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe_local.offload.kernels.cpu import CpuStep
from moe_local.offload.kernels.expert import ExpertKernels
from moe_local.offload.kernels.layer import LayerKernels, OneByOne
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native.library import library
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec
from support.expert_math import GptOss, Lease, Math
from support.packed import off

D, FF, EXPERTS = 96, 64, 12
FORMATS = ("nf4", "int8")


class Unknown(Math):
    """A gate that the library has not got."""

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=1)) * up  # and up is not clamped


class Doubled(Math):
    """Something after the down projection."""

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        return 2 * output


MATHS: dict[str, Callable[[], Math]] = {
    "gated": Math,
    "gated with biases": lambda: Math(has_bias=True),
    "not gated": lambda: Math(has_gate=False),
    "not gated, with biases": lambda: Math(has_gate=False, has_bias=True),
    "interleaved": lambda: GptOss(has_bias=True),
}
OTHERS: dict[str, Callable[[], Math]] = {"unknown": Unknown, "finished": Doubled}


def make_slots(format: str, math: Math) -> list[Lease]:
    """All experts of a layer."""
    first = "gate_up_proj" if math.has_gate else "up_proj"
    specs = [TensorSpec(first, (2 * FF if math.has_gate else FF, D)), TensorSpec("down_proj", (D, FF))]
    if math.has_bias:
        specs += [TensorSpec(f"{spec.name}_bias", spec.shape[:1]) for spec in tuple(specs)]
    codec = codec_for(format)
    layout, slots = codec.layout(specs), []
    generator = torch.Generator().manual_seed(1)
    for expert in range(EXPERTS):
        weights = {spec.name: torch.randn(spec.shape, generator=generator) / 8 for spec in specs}
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        codec.encode(weights, layout, buffer)
        slots.append(Lease(expert, buffer, layout))
    return slots


def plainly(
    math: Math, slots: list[Lease], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """In float64, from the decoded weights."""
    first, total = "gate_up_proj" if math.has_gate else "up_proj", torch.zeros(x.shape, dtype=torch.float64)
    for slot in slots:
        decoded = codec_for(slot.layout.format).decode(slot.buffer, slot.layout, torch.float32)
        w = {name: weight.double() for name, weight in decoded.items()}
        hidden = math.activate(x.double() @ w[first].T + w.get(f"{first}_bias", 0))
        y = math.finish(hidden @ w["down_proj"].T + w.get("down_proj_bias", 0))
        total += y * (weights.double() * (ids == slot.expert)).sum(dim=1, keepdim=True)
    return total


def routed(tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, D], ids and weights [T, K]."""
    generator = torch.Generator().manual_seed(100 * tokens + top_k)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k)
    return torch.randn(tokens, D, generator=generator), ids, weights


def by_groups(step: Any, slots: list[Lease], used: list[int], size: int) -> torch.Tensor:
    """The result where the slots that are used become readable `size` at a time."""
    for start in range(0, len(used), size):
        step.compute([slots[expert] for expert in used[start : start + size]])
    result: torch.Tensor = step.result()
    return result


needs_the_library = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")


@needs_the_library
@pytest.mark.parametrize("kind", MATHS)
@pytest.mark.parametrize("format", FORMATS)
def test_one_call_equals_one_by_one(format: str, kind: str) -> None:
    math = MATHS[kind]()
    slots = make_slots(format, math)
    kernels, each = LayerKernels(), ExpertKernels()
    for tokens, top_k in ((1, 1), (1, 8), (2, 4), (5, 1), (40, 3), (150, 8)):
        x, ids, weights = routed(tokens, top_k)
        routing = Routing(ids.flatten().tolist(), tokens, EXPERTS)
        want = plainly(math, slots, x, ids, weights)
        single = by_groups(OneByOne(each, math, x, routing, weights), slots, routing.experts, 5)
        assert off(single, want) < 1e-5
        results = []
        for size in (1, 3, EXPERTS):
            for order in (routing.experts, routing.experts[::-1]):
                step = kernels.begin(math, x, routing, weights, slots[0].layout)
                assert isinstance(step, CpuStep)
                results.append(by_groups(step, slots, order, size))
        assert off(results[0], want) < 1e-5
        assert all(torch.equal(result, results[0]) for result in results)


@needs_the_library
@pytest.mark.parametrize("activations", ["native", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_the_result_has_the_tokens_dtype(format: str, dtype: torch.dtype, activations: str) -> None:
    math = Math(has_bias=True)
    slots = make_slots(format, math)
    for tokens in (1, 30):
        x, ids, weights = routed(tokens, 2)
        x, weights = x.to(dtype), weights.to(dtype)
        routing = Routing(ids.flatten().tolist(), tokens, EXPERTS)
        step = LayerKernels(activations).begin(math, x, routing, weights, slots[0].layout)
        got = by_groups(step, slots, routing.experts, 4)
        assert got.dtype == dtype
        bound = 2e-2 if activations == "int8" else {torch.float32: 1e-5}.get(dtype, 6e-3)
        assert off(got, plainly(math, slots, x, ids, weights)) < bound


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("format", FORMATS)
def test_what_the_library_does_not_do_is_computed_one_by_one(format: str, kind: str) -> None:
    math = OTHERS[kind]()
    slots = make_slots(format, math)
    for tokens in (1, 9):
        x, ids, weights = routed(tokens, 3)
        routing = Routing(ids.flatten().tolist(), tokens, EXPERTS)
        step = LayerKernels().begin(math, x, routing, weights, slots[0].layout)
        assert isinstance(step, OneByOne)
        want = plainly(math, slots, x, ids, weights)
        assert off(by_groups(step, slots, routing.experts, 2), want) < 1e-5


def test_no_tokens_give_nothing() -> None:
    math = Math()
    (slot, *_) = make_slots("nf4", math)
    step = LayerKernels().begin(
        math, torch.empty(0, D), Routing([], 0, EXPERTS), torch.empty(0, 2), slot.layout
    )
    assert step.result().shape == (0, D)


@needs_the_library
def test_slots_are_read_anew_whatever_was_in_them_before() -> None:
    math = Math()
    slots = make_slots("nf4", math)
    kernels = LayerKernels()
    x, ids, weights = routed(3, 1)
    shared = slots[0].buffer.clone()
    for expert in (0, 5, 7):
        shared.copy_(slots[expert].buffer)
        here = Lease(expert, shared, slots[0].layout)
        step = kernels.begin(math, x, Routing([expert] * 3, 3, EXPERTS), weights, here.layout)
        step.compute([here])
        assert off(step.result(), plainly(math, [here], x, torch.full_like(ids, expert), weights)) < 1e-5
