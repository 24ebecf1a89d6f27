"""The grouped Triton kernels in Triton's interpreter, against torch on the decoded weights.

Run by test_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is first imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe_local.offload.kernels.expert import ExpertKernels
from moe_local.offload.kernels.gates import CONCATENATED, FUNCTIONS, INTERLEAVED, PLAIN
from moe_local.offload.kernels.grouped import GroupedExperts, GroupedStep, warm_up
from moe_local.offload.kernels.grouped_trial import fault
from moe_local.offload.kernels.launcher import UNIT, Launcher, pieces_of_a_step, triton_kernels
from moe_local.offload.kernels.layer import LayerKernels, OneByOne
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native.library import Gate
from moe_local.offload.quantize.codec import decoder_for
from moe_local.offload.quantize.layout import TensorSpec, make_layout
from moe_local.offload.quantize.views import segment_view, views_of
from moe_local.offload.store.residents import ResidentLayer
from support.expert_codecs import expert_codec
from support.expert_math import GptOss, Lease, Math

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_interpreter")]

CPU = torch.device("cpu")

WIDTH, HIDDEN = 32, 16
"""Of experts in int8, where no format is asked for: the interpreter takes milliseconds for every operation of
every program, of which these have few."""


class Experts:
    """Experts of one layer in slots of an arena, in an order that is not theirs."""

    def __init__(
        self,
        count: int,
        d: int = WIDTH,
        f: int = HIDDEN,
        *,
        has_gate: bool = True,
        has_bias: bool = False,
        format: str = "int8",
    ) -> None:
        self.first = "gate_up_proj" if has_gate else "up_proj"
        specs = [TensorSpec(self.first, (2 * f if has_gate else f, d)), TensorSpec("down_proj", (d, f))]
        if has_bias:
            specs += [TensorSpec(f"{spec.name}_bias", spec.shape[:1]) for spec in tuple(specs)]
        codec = expert_codec(format)
        self.layout = codec.layout(specs)
        self.stride = self.layout.nbytes + 4096
        self.arena = torch.full((count * self.stride,), 0xA5, dtype=torch.uint8)
        self.slots = [(3 * expert + 1) % count for expert in range(count)]
        assert len(set(self.slots)) == count
        generator = torch.Generator().manual_seed(count + d + f)
        self.weights, self.leases = [], []
        for expert, slot in enumerate(self.slots):
            buffer = self.arena[slot * self.stride : (slot + 1) * self.stride]
            weights = {s.name: torch.randn(s.shape, generator=generator) / 8 for s in specs}
            codec.encode(weights, self.layout, buffer[: self.layout.nbytes])
            self.weights.append(codec.decode(buffer, self.layout, torch.float32))
            self.leases.append(Lease(expert, buffer, self.layout))


def kernels() -> Any:
    found = triton_kernels(CPU)
    assert found is not None
    return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def gate_of(hidden: torch.Tensor, gate: Gate) -> torch.Tensor:
    """[T, F or 2F] -> [T, F], by torch."""
    if gate.arrangement == PLAIN:
        first, up = hidden, torch.ones(())
    elif gate.arrangement == INTERLEAVED:
        first, up = hidden[..., ::2], hidden[..., 1::2]
    else:
        first, up = hidden.chunk(2, dim=-1)
    name = FUNCTIONS[gate.function]
    if name in ("clamped_swiglu", "clamped_silu"):
        first, up = first.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit)
    if name == "clamped_swiglu":
        return (up + 1) * first * torch.sigmoid(first * gate.alpha)
    functions = {
        "identity": lambda x: x,
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
        "silu": F.silu,
        "clamped_silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    return functions[name](first) * up


def unplaned(hidden: torch.Tensor) -> torch.Tensor:
    """The inverse of Launcher.planes, of int8."""
    return hidden.view(len(hidden), 4, -1).transpose(1, 2).reshape(len(hidden), -1)


GATES = [
    *((arrangement, name) for arrangement, name in product(range(3), FUNCTIONS[:6])),
    *((arrangement, name) for arrangement, name in product((CONCATENATED, INTERLEAVED), FUNCTIONS[6:])),
]


@pytest.mark.parametrize(
    ("arrangement", "name", "has_bias"),
    [*((*gate, False) for gate in GATES), *((arrangement, "silu", True) for arrangement in range(3))],
)
def test_every_gate(arrangement: int, name: str, has_bias: bool) -> None:
    gate = Gate(arrangement, FUNCTIONS.index(name), 1.702, 1.5)
    has_gate = arrangement != PLAIN
    experts = Experts(1, has_gate=has_gate, has_bias=has_bias)
    launcher = Launcher(kernels(), experts.layout, gate, has_gate=has_gate, has_bias=has_bias)
    x = 2 * normal(1, WIDTH)
    hidden = torch.full((1, HIDDEN), torch.nan)
    launcher.up(experts.arena, 16, torch.tensor([[0, 0]]), launcher.planes(x), hidden, 1)
    (weights,) = experts.weights
    plain = x.double() @ weights[experts.first].double().T
    want = gate_of(plain + (weights[f"{experts.first}_bias"] if has_bias else 0), gate)
    assert error_of(unplaned(hidden), want) < 2e-6


@pytest.mark.parametrize("name", ["relu", "silu", "clamped_swiglu"])
def test_what_is_no_number_stays_none_and_with_its_token(name: str) -> None:
    gate = Gate(CONCATENATED, FUNCTIONS.index(name), 1.0, 1.0)
    experts = Experts(1)
    launcher = Launcher(kernels(), experts.layout, gate, has_gate=True, has_bias=False)
    x, hidden = normal(2, WIDTH), torch.zeros(2, HIDDEN)
    x[1, 5] = torch.nan
    launcher.up(experts.arena, 16, torch.tensor([[0, 0, 1]]), launcher.planes(x), hidden, 1)
    assert hidden[0].isfinite().all()
    assert hidden[1].isnan().all()


@pytest.mark.parametrize(
    ("format", "cols"),
    [
        *(("nf4", cols) for cols in (64, 768, 2112, 3072)),
        ("int8", 48),
        ("int8", 1040),
        ("q3", 64),
        ("q3", 1152),
        ("q2", 64),
        ("q2", 1088),
        *(("nvfp4", cols) for cols in (32, 1056, 2112)),
    ],
)
def test_rows_of_every_length(format: str, cols: int) -> None:
    """Shorter than a step, and steps with and without a rest; blocks at a row's end that are not whole."""
    codec = expert_codec(format)
    width = {"int8": 16, "nvfp4": 32}.get(format, 64)
    layout = codec.layout([TensorSpec("up_proj", (cols, width)), TensorSpec("down_proj", (width, cols))])
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    codec.encode({"up_proj": normal(cols, width), "down_proj": normal(width, cols, seed=1)}, layout, buffer)
    launcher = Launcher(kernels(), layout, Gate(PLAIN, 0, 0, 0), has_gate=False, has_bias=False)
    hidden, outputs = normal(3, cols, seed=2), torch.full((3, width), torch.nan)
    launcher.down(buffer, 16, torch.tensor([[0, 2, 0]]), launcher.planes(hidden), outputs)
    weight = codec.decode(buffer, layout, torch.float32)["down_proj"]
    assert error_of(outputs[[2, 0]], hidden[[2, 0]].double() @ weight.double().T) < 1e-6
    assert outputs[1].isnan().all()  # nobody asked for it


def test_wide_rows_are_read_by_many_threads() -> None:
    wanted = {4096: 128, 14336: 64, 2048: 64, 2880: 32, 7168: 32, 768: 32}
    assert {cols: pieces_of_a_step(cols // 32) for cols in wanted} == wanted


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_slots_by_number(tokens: int) -> None:
    """As a table of slots on a device would name them, with the arena's own stride; up to all tokens."""
    experts = Experts(5)
    math: Any = Math()
    launcher = GroupedExperts().launcher(math, CPU, experts.layout)
    assert launcher is not None
    top_k, x = 2, normal(tokens, WIDTH)
    some = max(1, tokens - 1)
    rows = [
        [experts.slots[4], *(top_k * t for t in range(tokens))],
        [experts.slots[2], *(top_k * t + 1 for t in range(some)), *[-1] * (tokens - some)],
    ]
    hidden, outputs = torch.empty(tokens * top_k, HIDDEN), torch.full((tokens * top_k, WIDTH), torch.nan)
    table = torch.tensor(rows)
    launcher.up(experts.arena, experts.stride, table, launcher.planes(x), hidden, top_k)
    launcher.down(experts.arena, experts.stride, table, hidden, outputs)
    for expert, count, rank in ((4, tokens, 0), (2, some, 1)):
        want = ExpertKernels().forward(math, x[:count], experts.leases[expert].buffer, experts.layout)
        assert error_of(outputs[rank::top_k][:count], want) < 1e-6
    assert outputs[1::top_k][some:].isnan().all()


def test_slots_far_beyond_what_32_bits_count() -> None:
    """Behind the base and before it."""
    experts = Experts(1)
    math: Any = Math()
    launcher = GroupedExperts().launcher(math, CPU, experts.layout)
    assert launcher is not None
    buffer, far = experts.leases[0].buffer, 5 << 30
    arena = torch.empty(far + len(buffer), dtype=torch.uint8)  # of which both ends are ever touched
    arena[: len(buffer)] = arena[far:] = buffer
    x, hidden, outputs = normal(1, WIDTH), torch.empty(1, HIDDEN), torch.empty(1, WIDTH)
    want = ExpertKernels().forward(math, x, buffer, experts.layout)
    for base, start in ((0, far), (far, -far)):
        outputs.fill_(torch.nan)
        table = torch.tensor([[start // UNIT, 0]])
        launcher.up(arena[base:], UNIT, table, launcher.planes(x), hidden, 1)
        launcher.down(arena[base:], UNIT, table, hidden, outputs)
        assert error_of(outputs, want) < 1e-6


@pytest.mark.parametrize("format", ["nf4", "q3", "q2", "nvfp4"])
def test_planes_in_several_steps(format: str) -> None:
    """As eight tokens meet them: to the bit as one token does, for which they are one step."""
    experts = Experts(1, 64, 64, format=format)
    launcher = Launcher(kernels(), experts.layout, Gate(PLAIN, 0, 0, 0), has_gate=True, has_bias=False)
    hidden, outputs, alone = normal(8, 64), torch.empty(8, 64), torch.empty(1, 64)
    launcher.down(experts.arena, UNIT, torch.tensor([[0, *range(8)]]), launcher.planes(hidden), outputs)
    launcher.down(experts.arena, UNIT, torch.tensor([[0, 0]]), launcher.planes(hidden[5:6]), alone)
    assert torch.equal(outputs[5], alone[0])


@pytest.mark.parametrize("format", ["nf4", "int8", "q3", "q2", "mxfp4", "fp8", "nvfp4", "nvfp4, divided"])
def test_every_format(format: str) -> None:
    """Up and down with biases, for one token and several, each answer as from the decoded weights."""
    math = MATHS["gpt-oss"]
    d, f = (64, 64) if format in ("nf4", "q3", "q2") else (64, 32)
    experts = Experts(4, d, f, has_bias=math.has_bias, format=format)
    for ids in ([[2]], [[0], [2], [0]]):
        index, x = torch.tensor(ids), normal(len(ids), d, seed=2)
        weights = normal(*index.shape, seed=1).abs()
        routing = Routing(index.flatten().tolist(), len(ids), 4)
        got = in_groups(begin(math, experts, x, routing, weights), experts, [routing.experts])
        assert error_of(got, plainly(math, experts, x, index, weights)) < 1e-6


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("grid", [(1, 1), (2, 4), (4, 1)])
def test_scales_as_publishers_store_them(scale: str, grid: tuple[int, int]) -> None:
    """One for a tensor, for halves stored apart, for blocks; biases of another dtype."""
    rows, cols = 8, 64
    spec = [TensorSpec("up_proj", (64, 16)), TensorSpec("down_proj", (rows, cols))]
    spec += [TensorSpec(f"{tensor.name}_bias", tensor.shape[:1]) for tensor in tuple(spec)]
    parts = [
        ("up_proj", "q", "float8_e4m3fn", (64, 16)),
        ("up_proj", "scale", scale, (1, 1)),
        ("down_proj", "q", "float8_e4m3fn", (rows, cols)),
        ("down_proj", "scale", scale, grid),
        ("up_proj_bias", "values", "bfloat16", (64,)),
        ("down_proj_bias", "values", "bfloat16", (rows,)),
    ]
    layout = make_layout("fp8", spec, parts)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for part in layout.segments:
        values = normal(*part.shape, seed=part.offset)
        if part.part == "scale":
            values = values.abs() + 0.1 if scale != "uint8" else (values + 126).round()
        segment_view(buffer, part).copy_(values)
    launcher = Launcher(kernels(), layout, Gate(PLAIN, 0, 0, 0), has_gate=False, has_bias=True)
    hidden, outputs = normal(1, cols, seed=2), torch.full((1, rows), torch.nan)
    launcher.down(buffer, 16, torch.tensor([[0, 0]]), launcher.planes(hidden), outputs)
    decoded = decoder_for("fp8").decode(buffer, layout, torch.float32)
    want = hidden.double() @ decoded["down_proj"].double().T + decoded["down_proj_bias"].double()
    assert error_of(outputs, want) < 1e-6


def test_every_e4m3_scale_of_nvfp4() -> None:
    """Exactly, the subnormal ones too; and the two codes of NaN as 480, as the CPU's kernels read them."""
    codec, rows, cols = expert_codec("nvfp4"), 64, 64
    layout = codec.layout([TensorSpec("up_proj", (cols, 32)), TensorSpec("down_proj", (rows, cols))])
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    parts = views_of(buffer, layout, "down_proj")
    parts["q"].fill_(0x22)  # the code of 1, twice
    parts["factor"].fill_(1)
    parts["scale"].view(torch.uint8).copy_(torch.arange(256).view(rows, 4))
    launcher = Launcher(kernels(), layout, Gate(PLAIN, 0, 0, 0), has_gate=False, has_bias=False)
    one_of_each_block, outputs = torch.eye(cols)[3::16].contiguous(), torch.empty(4, rows)
    table = torch.tensor([[0, *range(4)]])
    launcher.down(buffer, UNIT, table, launcher.planes(one_of_each_block), outputs)
    want = parts["scale"].float().nan_to_num(nan=480.0)
    want[-1, -1] = -480
    assert want.abs().unique().numel() == 128
    assert torch.equal(outputs.T, want)


def test_formats_side_by_side() -> None:
    """A layer whose experts have two layouts: the same bits as in launches of their own."""
    math, experts, other = Math(), Experts(4), Experts(4, format="fp8")
    experts.leases[1], experts.weights[1] = other.leases[1], other.weights[1]
    index, x = torch.tensor([[2, 1], [1, 0]]), normal(2, WIDTH, seed=2)
    weights = normal(2, 2, seed=1).abs()
    routing = Routing(index.flatten().tolist(), 2, 4)
    together = in_groups(begin(math, experts, x, routing, weights), experts, [[0, 1, 2]])
    assert error_of(together, plainly(math, experts, x, index, weights)) < 1e-6
    apart = in_groups(begin(math, experts, x, routing, weights), experts, [[1], [2, 0]])
    assert torch.equal(apart, together)


def in_groups(step: GroupedStep, experts: Experts, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    for group in groups:
        step.compute([experts.leases[expert] for expert in group])
    return step.result()


def begin(math: Any, experts: Experts, x: torch.Tensor, routing: Routing, weights: torch.Tensor) -> Any:
    each = ExpertKernels()
    return GroupedExperts().begin(
        math,
        x,
        routing,
        weights,
        experts.layout,
        lambda outputs: OneByOne(each, math, x, routing, weights, outputs),
    )


def plainly(
    math: Any, experts: Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """In float64, from the decoded weights."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for expert, found in enumerate(experts.weights):
        w = {name: weight.double() for name, weight in found.items()}
        hidden = math.activate(x.double() @ w[experts.first].T + w.get(f"{experts.first}_bias", 0))
        y = hidden @ w["down_proj"].T + w.get("down_proj_bias", 0)
        total += y * (weights.double() * (ids == expert)).sum(dim=1, keepdim=True)
    return total


MATHS = {
    "swiglu": Math(),
    "gpt-oss": GptOss(has_bias=True),
    "relu, no gate": Math(has_gate=False, has_bias=True),
}


@pytest.mark.parametrize("kind", MATHS)
def test_an_answer_is_the_same_in_every_group(kind: str) -> None:
    math = MATHS[kind]
    experts = Experts(5, has_gate=math.has_gate, has_bias=math.has_bias)
    for ids in ([[4, 0, 3]], [[1, 0], [2, 1]]):
        index = torch.tensor(ids)
        weights = normal(*index.shape, seed=1).abs()
        x = normal(len(ids), WIDTH, seed=2)
        routing = Routing(index.flatten().tolist(), len(ids), 5)
        used = routing.experts
        groups = ([used], [[expert] for expert in used[::-1]], [used[1:], used[:1]])
        results = [in_groups(begin(math, experts, x, routing, weights), experts, group) for group in groups]
        assert error_of(results[0], plainly(math, experts, x, index, weights)) < 1e-6
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)]
)
def test_the_result_has_the_tokens_dtype(dtype: torch.dtype, bound: float) -> None:
    math, experts = Math(), Experts(2)
    ids = torch.tensor([[1, 0], [0, 1]])
    x, weights = normal(2, WIDTH).to(dtype), normal(2, 2, seed=1).to(dtype)
    routing = Routing(ids.flatten().tolist(), 2, 2)
    got = in_groups(begin(math, experts, x, routing, weights), experts, [[1, 0]])
    assert got.dtype == dtype
    assert error_of(got, plainly(math, experts, x, ids, weights)) < bound


def test_experts_with_many_tokens_are_computed_elsewhere_into_the_same_sum() -> None:
    math, experts = Math(), Experts(2)
    ids = torch.tensor([[1]] * 9 + [[0]])
    x, weights = normal(10, WIDTH), normal(10, 1, seed=1)
    routing = Routing(ids.flatten().tolist(), 10, 2)
    got = in_groups(begin(math, experts, x, routing, weights), experts, [[0, 1]])
    assert error_of(got, plainly(math, experts, x, ids, weights)) < 1e-6


def test_residents_are_found_by_a_table_on_the_device() -> None:
    """To the bit as the host names them, wherever their arena's slots lie; and every choice is counted."""
    math, experts = Math(), Experts(5)
    launcher = GroupedExperts().launcher(math, CPU, experts.layout)
    assert launcher is not None
    slots = torch.tensor([slot * experts.stride // UNIT for slot in experts.slots])
    counts = torch.zeros(5, dtype=torch.int64)
    layer = ResidentLayer(launcher, slots, counts)
    for number, ids in enumerate(([4, 0, 3], [1, 2, 4], [2])):
        index, x = torch.tensor([ids]), normal(1, WIDTH, seed=number)
        weights = normal(1, len(ids), seed=number).abs()
        step = begin(math, experts, x, Routing(ids, 1, 5), weights)
        assert torch.equal(layer.run(experts.arena, x, index, weights), in_groups(step, experts, [ids]))
    assert counts.tolist() == [1, 1, 2, 1, 2]


def test_residents_of_several_formats() -> None:
    """To the bit as the host names them, each found by its own kernels in one arena."""
    math, parts = Math(), [Experts(4), Experts(4, format="fp8")]
    arena, kinds = torch.cat([part.arena for part in parts]), torch.tensor([0, 1, 0, 1, 1])
    slots, leases = [], []
    for expert, kind in enumerate(kinds.tolist()):
        part, number = parts[kind], expert % 4
        start = kind * parts[0].arena.numel() + part.slots[number] * part.stride
        slots.append(start // UNIT)
        leases.append(Lease(expert, arena[start : start + part.stride], part.layout))
    grouped = GroupedExperts()
    first, second = (grouped.launcher(math, CPU, part.layout) for part in parts)
    assert first is not None
    assert second is not None
    counts = torch.zeros(5, dtype=torch.int64)
    layer = ResidentLayer(first, torch.tensor(slots), counts, [second], kinds)
    for number, ids in enumerate(([4, 0, 3], [1, 2, 4], [2], [3, 1])):
        index, x = torch.tensor([ids]), normal(1, WIDTH, seed=number)
        weights = normal(1, len(ids), seed=number).abs()
        step = begin(math, parts[0], x, Routing(ids, 1, 5), weights)
        step.compute([leases[expert] for expert in ids])
        assert torch.equal(layer.run(arena, x, index, weights), step.result())
    assert counts.tolist() == [1, 2, 2, 2, 2]


def test_warming_up_launches_every_kernel_of_a_decode_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the steps of up to 8 tokens launch has been launched before; the slot's bytes do not matter."""
    math, experts = Math(), Experts(2)
    launcher = GroupedExperts().launcher(math, CPU, experts.layout)
    assert launcher is not None
    seen: list[int] = []
    up = launcher.up

    def counted(base: Any, stride: int, table: torch.Tensor, *rest: Any) -> None:
        seen.append(table.shape[1] - 1)
        up(base, stride, table, *rest)

    monkeypatch.setattr(launcher, "up", counted)
    warm_up(
        launcher,
        torch.zeros(8, WIDTH, dtype=torch.float16),
        2,
        torch.full_like(experts.leases[0].buffer, 255),
    )
    assert seen == [1, 2, 4, 8]


def test_the_kernels_pass_their_own_trial() -> None:
    """What is compared when a model is loaded."""
    math, experts = Math(), Experts(2)
    launcher = GroupedExperts().launcher(math, CPU, experts.layout)
    assert launcher is not None
    options: Any = {"math": math, "top_k": 2, "width": WIDTH, "dtype": torch.float32}
    assert fault(launcher, base=experts.leases[0].buffer, answers=LayerKernels().answers, **options) is None
