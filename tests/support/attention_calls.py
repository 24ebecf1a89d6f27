"""Calls of moe_attention and moe_layer on random numbers, and what they are to give."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, ClassVar, NamedTuple

import torch

from moe_local.offload.native.library import (
    DTYPES,
    FLOATS,
    FORMATS,
    HALVES,
    Attention,
    DeltaNet,
    LatentAttention,
    Layer,
    Matrix,
    Norm,
    Router,
    Sequence,
)
from support import packed

OUTSIDE = 77.0
"""Stands in the memory of outputs wherever a call has no business."""


SPANS = [(0, 20), (0, 0), (3, 700), (250, 260), (0, 255)]
"""The first and last positions that several tokens see."""


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


class AnyCall:
    """A call of a function of the library on random numbers."""

    function: ClassVar[str]
    arguments: dict[str, Any]
    """As the function takes them, in order."""
    x: torch.Tensor
    y: torch.Tensor
    """Room for as many numbers as x has, between sixteen on either side."""

    def __call__(self, lib: Any, **changed: Any) -> int:
        status: int = getattr(lib, self.function)(*(self.arguments | changed).values())
        return status

    def answer(self, lib: Any, **changed: Any) -> torch.Tensor:
        """What is in y, once nothing has been written beside it."""
        self.y.fill_(OUTSIDE)
        assert self(lib, **changed) == 0
        assert (self.y[:16] == OUTSIDE).all()
        assert (self.y[-16:] == OUTSIDE).all()
        return self.y[16:-16].view(self.x.shape).clone()


class Call(AnyCall):
    """A call of moe_attention for one token of random numbers."""

    function = "moe_attention"

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


class Together:
    """Calls for tokens of sequences that begin and end at different positions, as one call."""

    call: ClassVar[type[Any]] = Call

    def __init__(self, case: Any, spans: list[tuple[int, int]], seed: int = 0) -> None:
        self.calls = [self.call(case._replace(first=first, last=last), seed) for first, last in spans]
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


KINDS: dict[type[ctypes.Structure], str] = {
    Attention: "attention",
    LatentAttention: "latent_attention",
    DeltaNet: "delta_net",
}


class LayerCall:
    """A call of moe_layer around a Call, also of latent_calls.py or delta_net_calls.py; 8 experts to choose 2
    of."""

    def __init__(self, call: Any, shifted: bool, router_dtype: torch.dtype, normalized: bool) -> None:
        self.call, dtype, hidden = call, call.case.dtype, call.case.hidden
        generator = torch.Generator().manual_seed(9)
        self.norms = [torch.randn(hidden, generator=generator).to(dtype) for _ in range(2)]
        self.router = torch.randn(8, hidden, generator=generator).to(dtype)
        before, after = (Norm(norm.data_ptr(), 1e-5, shifted) for norm in self.norms)
        self.layer = Layer(None, None, None, before, after)
        setattr(self.layer, KINDS[type(call.struct)], ctypes.pointer(call.struct))
        plain = FORMATS[{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]]
        self.matrix = Matrix(format=plain, rows=8, cols=hidden, q=self.router.data_ptr())
        self.chooser = Router(
            *(ctypes.pointer(self.matrix), 2, normalized, 1.0, DTYPES[router_dtype], DTYPES[dtype]),
        )
        self.y, self.inner = torch.empty(hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
        self.weights, self.ids = torch.empty(2, dtype=torch.float32), torch.empty(2, dtype=torch.int64)

    def __call__(self, lib: Any, routed: bool = True, **changed: Any) -> int:
        given = self.call.arguments
        arguments: dict[str, Any] = {
            "layer": ctypes.byref(self.layer),
            "router": ctypes.byref(self.chooser) if routed else None,
            **{name: given.get(name) for name in ("x", "cos", "sin", "sequences", "tokens")},
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
            rest = (*sizes, out.data_ptr(), 1)
            assert lib.moe_norm(x.data_ptr(), of.weight, of.shifted, of.epsilon, *rest) == 0
            return out

        normed = norm(call.x, layer.before_attention)
        y = call.x + call.answer(lib, x=normed.data_ptr())
        inner = norm(y, layer.before_feed_forward)
        logits, weights, ids = torch.empty_like(inner), torch.empty(2), torch.empty(2, dtype=torch.int64)
        chooser = self.chooser
        outputs = logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
        assert lib.moe_route(ctypes.byref(chooser), inner.data_ptr(), 1, dtype, *outputs, 2) == 0
        rounded = {number: name for name, number in DTYPES.items()}[chooser.dtype]
        return y, inner, weights.to(rounded).float(), ids
