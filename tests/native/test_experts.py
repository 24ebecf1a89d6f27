"""moe_experts against plain torch: gates, biases, routings; and what may not change a bit of its answers."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

from moe_local.offload.native.library import BF16, DTYPES, FLOATS, FORMATS, INT8, INT16, Gate
from support import packed
from support.packed import UNLIKE
from support.variants import others_slow

PLAIN, CONCATENATED, INTERLEAVED = range(3)
RELU, SILU, CLAMPED = 1, 3, 6

GATES = {
    "plain": Gate(PLAIN, RELU, 0, 0),
    "concatenated": Gate(CONCATENATED, SILU, 0, 0),
    "interleaved": Gate(INTERLEAVED, SILU, 0, 0),
    "clamped": Gate(INTERLEAVED, CLAMPED, 1.702, 7.0),
}
BAD_ARGUMENT = 1
BOUNDS = {FLOATS: 5e-6, INT16: 2e-4, INT8: 3e-2, BF16: 1e-2}
"""Rounding happens twice, and a gate multiplies what two numbers are off by."""


def activate(gate: Gate, hidden: torch.Tensor) -> torch.Tensor:
    """What the gates above do, in the dtype of `hidden`."""
    if gate.arrangement == PLAIN:
        return F.relu(hidden)
    if gate.arrangement == CONCATENATED:
        first, second = hidden.chunk(2, dim=-1)
    else:
        first, second = hidden[..., ::2], hidden[..., 1::2]
    if gate.function == SILU:
        return F.silu(first) * second
    first, second = first.clamp(max=gate.limit), second.clamp(-gate.limit, gate.limit)
    return (second + 1) * first * torch.sigmoid(first * gate.alpha)


class Case(NamedTuple):
    """Experts, what they are asked, and what is to come out."""

    experts: list[Any]
    ids: torch.Tensor
    weights: torch.Tensor
    x: torch.Tensor
    outputs: torch.Tensor
    """float64 [T * K, D]."""
    combined: torch.Tensor
    """float64 [T, D]."""


def experts_of(format: str, width: int, hidden: int, gate: Gate, count: int) -> list[Any]:
    return [packed.pack_expert(format, width, hidden, gate, seed=e) for e in range(count)]


def without_weights(experts: list[Any]) -> list[Any]:
    """As the library needs them: what is kept all session long has no more."""
    return [
        expert._replace(up=expert.up._replace(weights=None), down=expert.down._replace(weights=None))
        for expert in experts
    ]


@functools.cache
def cases_of(format: str, kind: str) -> list[Case]:
    """Computed in float64, expert by expert; once for all instruction sets and ways."""
    gate, cases = GATES[kind], []
    for width, hidden in ((128, 192), (65, 33), (64, 1)):
        experts = experts_of(format, width, hidden, gate, 8)
        kept = without_weights(experts)
        for tokens, top_k in ((1, 1), (1, 8), (2, 3), (7, 2), (40, 4)):
            ids, weights = packed.routing(tokens, 8, top_k, seed=tokens)
            x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)) / 4
            outputs = torch.empty(tokens * top_k, width, dtype=torch.float64)
            for e in ids.unique().tolist():
                pairs = (ids.flatten() == e).nonzero().flatten()
                hidden_of = activate(gate, experts[e].up.product(x[pairs // top_k]))
                outputs[pairs] = experts[e].down.product(hidden_of)
            combined = (outputs.view(tokens, top_k, width) * weights.double().unsqueeze(-1)).sum(dim=1)
            cases.append(Case(kept, ids, weights, x, outputs, combined))
    return cases


ONE_OF_EACH = ("nf4", "int8", "q3", "bf16")
"""Formats of all ways to prepare inputs. Gates and batches know no formats: of the others two gates, and a
few tokens and more than make a batch, are enough."""


@pytest.mark.parametrize("activations", BOUNDS)
@pytest.mark.parametrize(
    ("format", "kind"),
    [
        (format, kind)
        for format, kind in itertools.product(FORMATS, GATES)
        if format in ONE_OF_EACH or kind in ("concatenated", "clamped")
    ],
)
def test_equals_the_plain_products(isa: str, format: str, kind: str, activations: int) -> None:
    for case in cases_of(format, kind):
        got = packed.run_experts(case.experts, case.ids, case.weights, case.x, GATES[kind], activations)
        assert packed.off(got.outputs, case.outputs) < BOUNDS[activations]
        assert packed.off(got.combined, case.combined) < BOUNDS[activations]


@functools.cache
def sixteen(format: str) -> list[Any]:
    return without_weights(experts_of(format, 128, 64, GATES["concatenated"], 16))


@pytest.mark.parametrize("activations", BOUNDS)
@pytest.mark.parametrize("format", others_slow(FORMATS, UNLIKE))
def test_neither_groups_nor_their_order_nor_threads_change_a_bit(
    isa: str, format: str, activations: int
) -> None:
    """Also where there are more pairs than make a batch, and batches would end elsewhere in other groups."""
    gate, experts = GATES["concatenated"], sixteen(format)
    shapes = ((1, 4), (3, 4), (80, 4), (300, 1), (35, 12))
    for tokens, top_k in shapes if format in ONE_OF_EACH else shapes[1:3]:
        ids, weights = packed.routing(tokens, 16, top_k, seed=tokens)
        if tokens == 300:
            ids = torch.where(torch.arange(300) < 253, 0, 3).unsqueeze(
                1
            )  # 256 pairs end 3 tokens into expert 3
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens))

        def run(threads: int = 1, groups: Any = None, of: Any = (ids, weights, x)) -> Any:
            return packed.run_experts(experts, *of, gate, activations, threads=threads, groups=groups)

        once = run()
        backwards = list(range(15, -1, -1))
        for groups in (
            [[e] for e in backwards],
            [backwards],
            [[*range(1, 16, 2)], [*range(0, 16, 2)]],
            [[3, 0, 15], [*range(4, 15)], [2, 1]],
        ):
            assert all(map(torch.equal, run(groups=groups), once))
        for threads in (2, 64):
            assert all(map(torch.equal, run(threads=threads), once))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_finds_and_counts_its_experts(lib: Any, isa: str, dtype: torch.dtype) -> None:
    gate = GATES["concatenated"]
    experts = [packed.pack_expert("nf4", 128, 64, gate, seed=seed) for seed in range(5)]
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    ids, weights = torch.tensor([3, 0, 4]), torch.tensor([0.5, 0.375, 0.125])
    table = (ctypes.c_void_p * 5)(*(ctypes.addressof(expert.struct) for expert in experts))
    chosen, combined = torch.tensor([7, 0, 0, 0, 1]), torch.empty_like(x)

    def call(**changed: Any) -> int:
        arguments: dict[str, Any] = {
            "experts": table,
            "count": 5,
            "ids": ids.data_ptr(),
            "weights": weights.data_ptr(),
            "top_k": 3,
            "gate": ctypes.byref(gate),
            "x": x.data_ptr(),
            "tokens": 1,
            "chosen": chosen.data_ptr(),
            "combined": combined.data_ptr(),
            "dtype": DTYPES[dtype],
            "activations": INT16,
            "threads": 2,
        }
        status: int = lib.moe_chosen_experts(*(arguments | changed).values())
        return status

    assert call() == 0
    assert chosen.tolist() == [8, 0, 0, 1, 2]
    outputs, want = torch.empty(3, 128), torch.empty_like(x)
    pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(experts[e].struct) for e in ids.tolist()))
    numbers = ctypes.c_int64 * 3
    status = lib.moe_experts(
        *(pointers, 3, (ctypes.c_int64 * 4)(*range(4)), numbers(), numbers(*range(3)), ctypes.byref(gate)),
        *(
            x.data_ptr(),
            1,
            outputs.data_ptr(),
            weights.data_ptr(),
            3,
            want.data_ptr(),
            DTYPES[dtype],
            INT16,
            1,
        ),
    )
    assert status == 0
    assert torch.equal(combined, want)

    for wrong in ([3, 0, 5], [3, -1, 4], [3, 0, 3]):
        assert call(ids=torch.tensor(wrong).data_ptr()) == BAD_ARGUMENT
    for name in ("experts", "ids", "weights", "gate", "x", "chosen", "combined"):
        assert call(**{name: None}) == BAD_ARGUMENT
    assert (
        call(top_k=0) == call(top_k=6) == call(threads=0) == call(dtype=3) == call(tokens=0) == BAD_ARGUMENT
    )
    assert chosen.tolist() == [8, 0, 0, 1, 2]


@pytest.mark.parametrize("activations", BOUNDS)
@pytest.mark.parametrize("tokens", [2, 7])
def test_tokens_find_their_experts_together(lib: Any, isa: str, tokens: int, activations: int) -> None:
    """With the same bits as if they were named, and the counts of all."""
    gate, experts = GATES["concatenated"], sixteen("nf4")
    ids, weights = packed.routing(tokens, 16, 4, seed=tokens)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens))
    table = (ctypes.c_void_p * 16)(*(ctypes.addressof(expert.struct) for expert in experts))
    chosen, combined = torch.zeros(16, dtype=torch.int64), torch.empty_like(x)
    for threads in (1, 3):
        status = lib.moe_chosen_experts(
            *(table, 16, ids.data_ptr(), weights.data_ptr(), 4, ctypes.byref(gate), x.data_ptr(), tokens),
            *(chosen.data_ptr(), combined.data_ptr(), DTYPES[x.dtype], activations, threads),
        )
        assert status == 0
        want = packed.run_experts(experts, ids, weights, x, gate, activations)
        assert torch.equal(combined, want.combined)
    assert torch.equal(chosen, 2 * torch.bincount(ids.flatten(), minlength=16))


def test_experts_and_tokens_that_are_not_there(lib: Any) -> None:
    gate = GATES["concatenated"]
    experts = [packed.pack_expert("nf4", 64, 64, gate, seed=e) for e in range(4)]
    ids, weights = torch.tensor([[2], [2]]), torch.ones(2, 1)
    x = torch.randn(2, 64)
    some = packed.run_experts(experts, ids, weights, x, gate, FLOATS)  # three experts have no tokens
    assert torch.equal(some.combined, some.outputs)
    nothing = torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1)
    assert packed.run_experts(experts, *nothing, torch.empty(0, 64), gate, FLOATS).combined.shape == (0, 64)


def test_only_the_places_asked_for_are_written(lib: Any) -> None:
    gate = GATES["plain"]
    experts = [packed.pack_expert("nf4", 64, 64, gate, seed=e) for e in range(4)]
    ids, weights = packed.routing(6, 4, 2)
    x = torch.randn(6, 64)
    out = packed.Guarded(12, 64)
    places = (ids.flatten() == 1).nonzero().flatten()
    rows = places // 2
    status = lib.moe_experts(
        (ctypes.c_void_p * 1)(ctypes.addressof(experts[1].struct)),
        1,
        (ctypes.c_int64 * 2)(0, len(places)),
        rows.data_ptr(),
        places.data_ptr(),
        ctypes.byref(gate),
        x.data_ptr(),
        6,
        out.values.data_ptr(),
        None,
        2,
        None,
        0,
        FLOATS,
        1,
    )
    assert status == 0
    written = out.take().isfinite().all(dim=1).nonzero().flatten()
    assert torch.equal(written, places)
    whole = packed.run_experts(experts, ids, weights, x, gate, FLOATS)
    assert torch.equal(out.values[places], whole.outputs[places])


@pytest.mark.parametrize("activations", BOUNDS)
def test_a_token_that_is_no_number_spoils_no_other(isa: str, activations: int) -> None:
    gate = GATES["concatenated"]
    experts = [packed.pack_expert("nf4", 128, 192, gate, seed=e) for e in range(4)]
    for tokens in (2, 12):
        ids, weights = packed.routing(tokens, 4, 2, seed=tokens)
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens))
        clean = packed.run_experts(experts, ids, weights, x, gate, activations)
        x[1, 3] = float("nan")
        got = packed.run_experts(experts, ids, weights, x, gate, activations)
        assert got.combined[1].isnan().all()
        others = [t for t in range(tokens) if t != 1]
        assert torch.equal(got.combined[others], clean.combined[others])


def test_combining_alone_gives_the_same_sum(isa: str, lib: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, top_k, cols in ((1, 1, 1), (3, 2, 63), (2, 8, 200)):
        rows = torch.randn(tokens * top_k, cols, generator=generator)
        weights = torch.rand(tokens, top_k, generator=generator)
        out = packed.Guarded(tokens, cols)
        assert (
            lib.moe_combine(rows.data_ptr(), weights.data_ptr(), tokens, top_k, cols, out.values.data_ptr())
            == 0
        )
        terms = (rows.view(tokens, top_k, cols) * weights.unsqueeze(-1)).unbind(1)
        want = terms[0]
        for term in terms[1:]:
            want = want + term
        assert torch.equal(out.take(), want)
