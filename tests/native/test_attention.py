"""moe_attention against float64: every instruction set, dtype, format, rotation, length, layout of heads; and
moe_layer against the calls that it is made of."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from moe_local.offload.native.library import (
    BF16,
    DTYPES,
    FLOATS,
    FORMATS,
    HALVES,
    INT16,
    NEIGHBOURS,
    Attention,
    Layer,
    Matrix,
    Norm,
    Router,
    Sequence,
)
from support import packed

BAD_ARGUMENT = 1
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Largest relative error, in the Frobenius norm."""

ROUNDED = {FLOATS: 0.0, INT16: 1e-4, BF16: 1e-4}
"""What the activations' rounding adds to it."""

OUTSIDE = 77.0
"""Stands in the memory of outputs wherever a call has no business."""


class Case(NamedTuple):
    """What to attend with. `first` and `last` as a Sequence has them; `spare`: columns after the last."""

    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    rotated: int = 16
    rotation: int = HALVES
    shared: bool = False
    norms: bool = False
    sinks: bool = False
    gated: bool = False
    shifted: bool = False
    bias: torch.dtype | None = None
    format: str = "fp32"
    dtype: torch.dtype = torch.float32
    hidden: int = 64
    first: int = 0
    last: int = 20
    spare: int = 3


@functools.cache
def matrix_of(*shape: Any, **options: Any) -> Any:
    """packed.pack, once for all calls, which only read it."""
    return packed.pack(*shape, **options)


class Call:
    """A call of moe_attention for one token of random numbers."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        dtype, queries, keys = case.dtype, case.heads * case.width, case.kv_heads * case.width

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        asked = queries * (2 if case.gated else 1)
        shapes = {"q": (asked, case.hidden), "k": (keys, case.hidden), "v": (keys, case.hidden)}
        shapes["o"] = case.hidden, queries
        options = {"bias": case.bias is not None, "bias_dtype": case.bias or torch.float32}
        self.matrices = {
            name: matrix_of(case.format, *shape, seed=seed + place, **options)
            for place, (name, shape) in enumerate(shapes.items())
        }
        size = float(self.matrices["q"].weights.std()) * case.hidden**0.5  # that queries are about one
        self.x = packed.at_odd_address((random(case.hidden).float() / size).to(dtype), 1)
        angles = case.rotated // 2 if case.shared else case.rotated
        self.cos, self.sin = random(angles), random(angles)
        self.norms = (random(case.width), random(case.width)) if case.norms else (None, None)
        self.sinks = random(case.heads) if case.sinks else None
        columns = case.last + 1 + case.spare
        self.keys, self.values = (self._memory(random(case.kv_heads, columns, case.width)) for _ in "kv")
        self.y = torch.full((case.hidden + 32,), OUTSIDE, dtype=dtype)
        self.struct = struct = Attention(*(self.matrices[name].struct for name in "qkvo"))
        struct.heads, struct.kv_heads, struct.width = case.heads, case.kv_heads, case.width
        struct.rotated, struct.rotation, struct.shared = case.rotated, case.rotation, case.shared
        struct.scaling, struct.epsilon, struct.dtype = case.width**-0.5, 1e-5, DTYPES[dtype]
        struct.q_norm, struct.k_norm = (None if norm is None else norm.data_ptr() for norm in self.norms)
        struct.sinks = None if self.sinks is None else self.sinks.data_ptr()
        struct.gated, struct.shifted = case.gated, case.shifted
        addresses = self.keys.data_ptr(), self.values.data_ptr()
        self.sequence = Sequence(*addresses, self.keys.stride(0), case.first, case.last)
        self.arguments: dict[str, Any] = {
            "attention": ctypes.byref(struct),
            "x": self.x.data_ptr(),
            "cos": self.cos.data_ptr() if angles else None,
            "sin": self.sin.data_ptr() if angles else None,
            "sequences": ctypes.byref(self.sequence),
            "tokens": 1,
            "y": self.y[16:].data_ptr(),
            "activations": FLOATS,
            "threads": 1,
        }

    def _memory(self, numbers: torch.Tensor) -> torch.Tensor:
        """Theirs where the token sees them, elsewhere NaN, whose sight would spoil all."""
        numbers[:, : self.case.first] = float("nan")
        numbers[:, self.case.last :] = float("nan")
        return numbers

    def __call__(self, lib: Any, **changed: Any) -> int:
        status: int = lib.moe_attention(*(self.arguments | changed).values())
        return status

    def answer(self, lib: Any, **changed: Any) -> torch.Tensor:
        """y [D], once nothing has been written beside it."""
        assert self(lib, **changed) == 0
        assert (self.y[:16] == OUTSIDE).all()
        assert (self.y[16 + self.case.hidden :] == OUTSIDE).all()
        return self.y[16 : 16 + self.case.hidden].clone()

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y [D], and the token's key and value [kv_heads, width], in float64."""
        case, x = self.case, self.x.double()
        q, k, v = (self.matrices[name].product(x[None]).view(-1, case.width) for name in "qkv")
        q, gates = (q[::2], q[1::2].sigmoid()) if case.gated else (q, 1)
        for heads, norm in zip((q, k), self.norms, strict=True):
            if norm is not None:
                factor = norm.double() + case.shifted
                heads *= (heads.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * factor
        q, k = self._rotate(q), self._rotate(k)
        seen = slice(case.first, case.last)
        keys = torch.cat([self.keys[:, seen].double(), k[:, None]], 1)
        values = torch.cat([self.values[:, seen].double(), v[:, None]], 1)
        groups = case.heads // case.kv_heads
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        scores = (keys @ q[:, :, None])[..., 0] * case.width**-0.5
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.double()[:, None]], 1)
        shares = scores.softmax(-1)[:, None, : keys.shape[1]]
        answers = (shares @ values)[:, 0] * gates
        return self.matrices["o"].product(answers.view(1, -1))[0], k, v

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """As transformers' apply_rotary_pos_emb, or its interleaved relative."""
        case, cos, sin = self.case, self.cos.double(), self.sin.double()
        x, rest = x[:, : case.rotated], x[:, case.rotated :]
        if case.rotation == HALVES:
            if case.shared:
                cos, sin = torch.cat([cos, cos]), torch.cat([sin, sin])
            first, second = x.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        else:
            if case.shared:
                cos, sin = cos.repeat_interleave(2), sin.repeat_interleave(2)
            turned = torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(1)
        return torch.cat([x * cos + turned * sin, rest], -1)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(lib: Any, case: Case, activations: int = FLOATS) -> None:
    """The answer is right, and so are the key and value written; nothing else is."""
    call = Call(case)
    want = call.reference()
    before = call.keys.clone(), call.values.clone()
    y = call.answer(lib, activations=activations)
    allowed = BOUNDS[case.dtype] + ROUNDED[activations]
    for after, old, new in zip((call.keys, call.values), before, want[1:], strict=True):
        assert off(after[:, case.last], new) < allowed, case
        after[:, case.last] = old[:, case.last]
        assert torch.equal(after.view(torch.uint8), old.view(torch.uint8)), case
    assert off(y, want[0]) < allowed, case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_exact_answer(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    case = Case(format=format, dtype=dtype, norms=True, sinks=True, bias=torch.float32)
    for activations in (FLOATS, INT16, BF16):
        check(lib, case, activations)
    check(lib, case._replace(hidden=72, width=48, rotated=48, bias=None))  # no whole blocks of 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2), (14, 2)])
def test_heads_of_any_width(lib: Any, isa: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    for width in (16, 48, 64, 128, 256):
        check(lib, Case(*heads, width=width, rotated=width, dtype=dtype, norms=width == 48))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_gates_and_shifted_norms(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    case = Case(format=format, dtype=dtype, norms=True, gated=True, shifted=True)
    check(lib, case)
    check(lib, case._replace(heads=6, width=48, rotated=12, last=300, hidden=200, bias=torch.float32))


@pytest.mark.parametrize("rotation", [HALVES, NEIGHBOURS])
@pytest.mark.parametrize("shared", [False, True])
def test_rotations(lib: Any, isa: str, rotation: int, shared: bool) -> None:
    for width, rotated in ((16, 16), (16, 0), (16, 2), (64, 32), (64, 14), (128, 128), (48, 46)):
        case = Case(width=width, rotated=rotated, rotation=rotation, shared=shared, last=3)
        for dtype in DTYPES:
            check(lib, case._replace(dtype=dtype, norms=dtype != torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1000])
def test_any_number_of_positions(lib: Any, isa: str, length: int, dtype: torch.dtype) -> None:
    for first, spare in ((0, 0), (0, 5), (1, 5), (13, 0), (300, 5)):
        case = Case(dtype=dtype, first=first, last=first + length - 1, spare=spare)
        check(lib, case._replace(heads=10, sinks=spare == 5))


@pytest.mark.parametrize("bias", DTYPES)
def test_biases_of_any_dtype(lib: Any, isa: str, bias: torch.dtype) -> None:
    for format in FORMATS:
        check(lib, Case(format=format, bias=bias))


def test_scores_far_apart_and_far_from_zero(lib: Any, isa: str) -> None:
    """A softmax that is not careful makes infinities of them, in one look or between looks."""
    for scale in (1e2, 1e4, -1e4):
        call = Call(Case(last=600, sinks=True, bias=torch.float32))
        call.keys *= scale
        want, _, _ = call.reference()
        assert off(call.answer(lib), want) < 3e-4  # floats hold no more of scores that large
        assert call.sinks is not None
        call.sinks.fill_(1e6)
        assert torch.equal(call.answer(lib).double(), call.matrices["o"].bias)


@pytest.mark.parametrize("format", FORMATS)
def test_the_number_of_threads_changes_no_bit(lib: Any, isa: str, format: str) -> None:
    case = Case(heads=8, kv_heads=4, width=64, rotated=64, hidden=576, format=format, last=700, gated=True)
    alone = Call(case)
    want = alone.answer(lib)
    for threads in (2, 3, 64, 1000):
        call = Call(case)
        assert torch.equal(call.answer(lib, threads=threads), want)
        for got, once in ((call.keys, alone.keys), (call.values, alone.values)):
            assert torch.equal(got.view(torch.int32), once.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_number_that_is_none_spoils_all(lib: Any, isa: str, format: str, dtype: torch.dtype) -> None:
    for last in (0, 300):
        for activations in (FLOATS, INT16, BF16):
            call = Call(Case(format=format, dtype=dtype, norms=True, last=last))
            call.x[5] = float("nan")
            assert call.answer(lib, activations=activations).isnan().all()
            assert call.keys[:, last].isnan().all()
            assert call.values[:, last].isnan().all()


def test_an_earlier_number_that_is_none_spoils_the_answer(lib: Any, isa: str) -> None:
    for position in (0, 5, 255, 256, 299):
        for name, bad in (("keys", "nan"), ("values", "inf"), ("values", "nan")):
            call = Call(Case(heads=5, kv_heads=1, last=300))
            assert torch.isfinite(call.answer(lib)).all()
            getattr(call, name)[0, position] = float(bad)
            assert not torch.isfinite(call.answer(lib)).any()


def test_the_reference_agrees_with_torch(lib: Any, isa: str) -> None:
    call = Call(Case(heads=4, kv_heads=2, width=64, rotated=0, last=40))
    q, k, v = (call.matrices[n].product(call.x[None].double()).float().view(-1, 1, 64) for n in "qkv")
    keys = torch.cat([call.keys[:, :40], k], 1)[None]
    values = torch.cat([call.values[:, :40], v], 1)[None]
    heads = nn.functional.scaled_dot_product_attention(q[None], keys, values, enable_gqa=True)
    want = call.matrices["o"].product(heads.reshape(1, -1))[0]
    assert off(call.answer(lib), want) < BOUNDS[torch.float32]


def put(of: Callable[[Call], Any], field: str, value: Any) -> Callable[[Call], Any]:
    return lambda call: setattr(of(call), field, value)


def of_struct(field: str, value: Any) -> Callable[[Call], Any]:
    return put(lambda call: call.struct, field, value)


def of_matrix(name: str, field: str, value: Any) -> Callable[[Call], Any]:
    return put(lambda call: getattr(call.struct, name), field, value)


def of_sequence(field: str, value: Any) -> Callable[[Call], Any]:
    return put(lambda call: call.sequence, field, value)


def argument(name: str, value: Any) -> Callable[[Call], Any]:
    return lambda call: call.arguments.__setitem__(name, value)


WRONG: dict[str, Callable[[Call], Any]] = {
    **{f"no {name}": argument(name, None) for name in ("attention", "x", "cos", "sin", "sequences", "y")},
    **{f"{name} without bytes": of_matrix(name, "q", None) for name in "qkvo"},
    **{f"{name} of no format": of_matrix(name, "format", max(FORMATS.values()) + 1) for name in "qkvo"},
    **{f"{name} of another format": of_matrix(name, "format", FORMATS["bf16"]) for name in "qkv"},
    **{f"{name} with fewer rows": of_matrix(name, "rows", 16) for name in "qkvo"},
    **{f"{name} with fewer columns": of_matrix(name, "cols", 32) for name in "qkvo"},
    **{f"{name} with a bias of no dtype": of_matrix(name, "bias_dtype", 3) for name in "qkvo"},
    **{f"{name} of zero": of_struct(name, 0) for name in ("heads", "kv_heads", "width")},
    **{f"negative {name}": of_struct(name, -2) for name in ("heads", "kv_heads", "width", "rotated")},
    "gates that q has no rows for": of_struct("gated", 1),
    "heads that share no keys": of_struct("kv_heads", 3),
    "more heads than rows": of_struct("heads", 8),
    "heads beyond all numbers": of_struct("heads", 2**62),
    "a width of no whole step": of_struct("width", 8),
    "a width beyond all numbers": of_struct("width", 2**62),
    "more to rotate than there is": of_struct("rotated", 18),
    "an odd number to rotate": of_struct("rotated", 3),
    "rotation below": of_struct("rotation", -1),
    "rotation above": of_struct("rotation", 2),
    "dtype below": of_struct("dtype", -1),
    "dtype above": of_struct("dtype", 3),
    "no keys": of_sequence("keys", None),
    "no values": of_sequence("values", None),
    "a negative stride": of_sequence("head_stride", -1),
    "heads that overlap": of_sequence("head_stride", 21 * 16 - 1),
    "a stride beyond all numbers": of_sequence("head_stride", 2**62),
    "a negative first": of_sequence("first", -1),
    "a first behind the last": of_sequence("first", 21),
    "a negative last": of_sequence("last", -1),
    "a last beyond all numbers": of_sequence("last", 2**62),
    "the largest last": of_sequence("last", 2**63 - 1),
    "no tokens": argument("tokens", 0),
    "more tokens than a call takes": argument("tokens", 257),
    "no threads": argument("threads", 0),
    "fewer than no threads": argument("threads", -4),
    "activations below": argument("activations", -1),
    "activations above": argument("activations", 4),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused(lib: Any, wrong: str) -> None:
    call = Call(Case())
    call.answer(lib)
    for memory in (call.y, call.keys, call.values):
        memory.fill_(OUTSIDE)
    WRONG[wrong](call)
    assert call(lib) == BAD_ARGUMENT
    for memory in (call.y, call.keys, call.values):
        assert (memory == OUTSIDE).all()


def test_what_is_not_used_may_be_left_out(lib: Any) -> None:
    call = Call(Case(rotated=0))
    want = call.answer(lib)
    assert torch.equal(call.answer(lib, cos=call.x.data_ptr(), sin=call.x.data_ptr()), want)
    single = Call(Case(heads=2, kv_heads=1))
    want = single.answer(lib)
    single.sequence.head_stride = 0  # there is no second head
    assert torch.equal(single.answer(lib), want)


class Together:
    """Calls for tokens of sequences that begin and end at different positions, as one call."""

    def __init__(self, case: Case, spans: list[tuple[int, int]]) -> None:
        self.calls = [Call(case._replace(first=first, last=last)) for first, last in spans]
        for place, call in enumerate(self.calls):
            for numbers in (call.x, call.cos, call.sin):
                numbers.mul_((1.0, 0.75, 0.5)[place % 3])
        self.x, self.cos, self.sin = (
            torch.stack([getattr(call, name) for call in self.calls]) for name in ("x", "cos", "sin")
        )
        self.sequences = (Sequence * len(spans))(*(call.sequence for call in self.calls))
        self.y = torch.full_like(self.x, OUTSIDE)

    def arguments(self, **changed: Any) -> dict[str, Any]:
        given = {name: getattr(self, name).data_ptr() for name in ("x", "cos", "sin", "y")}
        several = {"sequences": self.sequences, "tokens": len(self.calls)}
        return self.calls[0].arguments | given | several | changed

    def forget(self) -> list[torch.Tensor]:
        """What the calls have written to their sequences, which is overwritten."""
        written = [x[:, call.case.last].clone() for call in self.calls for x in (call.keys, call.values)]
        for call in self.calls:
            call.keys[:, call.case.last] = call.values[:, call.case.last] = OUTSIDE
        return written


SPANS = [(0, 20), (0, 0), (3, 700), (250, 260), (0, 255)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_each_of_several_tokens_has_what_it_has_alone(
    lib: Any, isa: str, format: str, dtype: torch.dtype
) -> None:
    """Bit for bit, if all are multiplied in registers; of many, within the bounds."""
    case = Case(format=format, dtype=dtype, norms=True, sinks=True, gated=True, bias=torch.float32)
    for spans, activations in (
        (SPANS[:4], FLOATS),
        (SPANS[:4], INT16),
        (4 * SPANS, INT16),
        (4 * SPANS, FLOATS),
    ):
        together = Together(case, spans)
        want = torch.stack([call.answer(lib, activations=activations) for call in together.calls])
        written = together.forget()
        for threads in (1, 3):
            arguments = together.arguments(activations=activations, threads=threads)
            assert lib.moe_attention(*arguments.values()) == 0
            pairs = [(together.y, want), *zip(together.forget(), written, strict=True)]
            for got, alone in pairs:
                if len(spans) <= 4:
                    assert torch.equal(got, alone)
                else:
                    assert off(got, alone.double()) < BOUNDS[dtype] + ROUNDED[activations]


class LayerCall:
    """A call of moe_layer around a Call, 8 experts to choose 2 of."""

    def __init__(self, call: Call, shifted: bool, router_dtype: torch.dtype, normalized: bool) -> None:
        self.call, dtype, hidden = call, call.case.dtype, call.case.hidden
        generator = torch.Generator().manual_seed(9)
        self.norms = [torch.randn(hidden, generator=generator).to(dtype) for _ in range(2)]
        self.router = torch.randn(8, hidden, generator=generator).to(dtype)
        before, after = (Norm(norm.data_ptr(), 1e-5, shifted) for norm in self.norms)
        self.layer = Layer(ctypes.pointer(call.struct), before, after)
        plain = FORMATS[{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]]
        self.matrix = Matrix(format=plain, rows=8, cols=hidden, q=self.router.data_ptr())
        self.chooser = Router(ctypes.pointer(self.matrix), 2, normalized, DTYPES[router_dtype])
        self.y, self.inner = torch.empty(hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
        self.weights, self.ids = torch.empty(2, dtype=torch.float32), torch.empty(2, dtype=torch.int64)

    def __call__(self, lib: Any, routed: bool = True, **changed: Any) -> int:
        given = self.call.arguments
        arguments: dict[str, Any] = {
            "layer": ctypes.byref(self.layer),
            "router": ctypes.byref(self.chooser) if routed else None,
            **{name: given[name] for name in ("x", "cos", "sin", "sequences", "tokens")},
            "y": self.y.data_ptr(),
            "inner": self.inner.data_ptr(),
            "weights": self.weights.data_ptr(),
            "ids": self.ids.data_ptr(),
            "activations": given["activations"],
            "threads": given["threads"],
        }
        status: int = lib.moe_layer(*(arguments | changed).values())
        return status

    def parts(self, lib: Any) -> tuple[torch.Tensor, ...]:
        """y, inner, weights and ids by moe_norm, moe_attention, a sum of torch's, and moe_route."""
        call, layer, dtype = self.call, self.layer, DTYPES[self.call.case.dtype]

        def norm(x: torch.Tensor, of: Norm) -> torch.Tensor:
            out = torch.empty_like(x)
            sizes = (1, x.numel(), dtype)
            assert lib.moe_norm(x.data_ptr(), of.weight, of.shifted, of.epsilon, *sizes, out.data_ptr()) == 0
            return out

        normed = norm(call.x, layer.before_attention)
        y = call.x + call.answer(lib, x=normed.data_ptr())
        inner = norm(y, layer.before_feed_forward)
        logits, weights, ids = torch.empty_like(inner), torch.empty(2), torch.empty(2, dtype=torch.int64)
        chooser = self.chooser
        status = lib.moe_route(
            *(
                ctypes.byref(self.matrix),
                inner.data_ptr(),
                1,
                dtype,
                2,
                chooser.normalized,
                logits.data_ptr(),
            ),
            *(weights.data_ptr(), ids.data_ptr()),
        )
        assert status == 0
        rounded = {number: name for name, number in DTYPES.items()}[chooser.dtype]
        return y, inner, weights.to(rounded).float(), ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [False, True])
def test_a_layer_is_its_parts_one_after_the_other(
    lib: Any, isa: str, dtype: torch.dtype, shifted: bool
) -> None:
    for router_dtype, normalized in ((dtype, True), (torch.float32, False)):
        call = Call(Case(format="nf4", dtype=dtype, norms=True, hidden=192, heads=6))
        layer = LayerCall(call, shifted, router_dtype, normalized)
        want = layer.parts(lib)
        keys, values = call.keys.clone(), call.values.clone()
        for threads in (1, 3):
            call.keys[:, call.case.last] = call.values[:, call.case.last] = OUTSIDE
            assert layer(lib, threads=threads) == 0
            got = layer.y, layer.inner, layer.weights, layer.ids
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            for mine, theirs in ((call.keys, keys), (call.values, values)):
                assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        layer.ids.fill_(-7)
        assert layer(lib, routed=False, weights=None, ids=None) == 0
        assert torch.equal(layer.inner, want[1])
        assert (layer.ids == -7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tokens_pass_a_layer_as_each_does_alone(lib: Any, isa: str, dtype: torch.dtype) -> None:
    case = Case(format="nf4", dtype=dtype, norms=True, hidden=192, heads=6)
    together = Together(case, SPANS[:4])
    layers = [LayerCall(call, False, dtype, True) for call in together.calls]
    assert [layer(lib) for layer in layers] == [0] * 4
    want = [
        torch.stack([getattr(layer, name) for layer in layers]) for name in ("y", "inner", "weights", "ids")
    ]
    written = together.forget()
    for threads in (1, 3):
        got = [torch.full_like(x, -7) for x in want]
        outputs = dict(zip(("y", "inner", "weights", "ids"), (x.data_ptr() for x in got), strict=True))
        places = {name: together.arguments()[name] for name in ("x", "cos", "sin", "sequences", "tokens")}
        assert layers[0](lib, **places, **outputs, threads=threads) == 0
        assert all(map(torch.equal, got, want))
        assert all(map(torch.equal, together.forget(), written))


LAYERS_WRONG: dict[str, Callable[[LayerCall], dict[str, Any] | None]] = {
    **{f"no {name}": lambda _, name=name: {name: None} for name in ("layer", "x", "y", "inner", "ids")},
    "no attention": lambda call: setattr(call.layer, "attention", None),
    "a norm without weight": lambda call: setattr(call.layer.before_attention, "weight", None),
    "another without": lambda call: setattr(call.layer.before_feed_forward, "weight", None),
    "a router without matrix": lambda call: setattr(call.chooser, "matrix", None),
    "a router of another width": lambda call: setattr(call.matrix, "cols", 32),
    "a router without rows": lambda call: setattr(call.matrix, "rows", 0),
    "more experts than there are": lambda call: setattr(call.chooser, "top_k", 9),
    "weights of no dtype": lambda call: setattr(call.chooser, "dtype", 3),
}


@pytest.mark.parametrize("wrong", LAYERS_WRONG)
def test_wrong_layers_are_refused(lib: Any, wrong: str) -> None:
    call = LayerCall(Call(Case()), False, torch.float32, True)
    assert call(lib) == 0
    assert call(lib, **(LAYERS_WRONG[wrong](call) or {})) == BAD_ARGUMENT
