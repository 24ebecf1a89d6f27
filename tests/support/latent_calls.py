"""Calls of moe_latent_attention on random numbers, and what they are to give."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from moe_local.offload.native.library import (
    APART,
    DTYPES,
    FLOATS,
    HALVES,
    NEIGHBOURS,
    LatentAttention,
    Sequence,
)
from support import attention_calls, packed
from support.attention_calls import OUTSIDE, AnyCall, matrix_of

EPSILON = 1e-5


class Case(NamedTuple):
    """What to attend with. `ranks`: of queries; 0 for a matrix that is applied to the input. `first` and
    `last` as a Sequence has them; `spare`: columns after the last."""

    heads: int = 3
    ranks: int = 40
    latent: int = 64
    plain: int = 24
    rotated: int = 16
    value: int = 20
    rotation: int = HALVES
    shared: bool = False
    bias: torch.dtype | None = None
    format: str = "fp32"
    dtype: torch.dtype = torch.float32
    hidden: int = 64
    first: int = 0
    last: int = 20
    spare: int = 3


class Call(AnyCall):
    """A call for one token of random numbers."""

    function = "moe_latent_attention"

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        dtype = case.dtype

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        queries = case.heads * (case.plain + case.rotated)
        shapes = {
            "q_a": (case.ranks, case.hidden),
            "q_b": (queries, case.ranks or case.hidden),
            "kv_a": (case.latent + case.rotated, case.hidden),
            "kv_b": (case.heads * (case.plain + case.value), case.latent),
            "o": (case.hidden, case.heads * case.value),
        }
        if not case.ranks:
            del shapes["q_a"]
        self.matrices = {
            name: matrix_of(
                case.format,
                *shape,
                seed=seed + place,
                bias=case.bias is not None and name != "kv_b",
                bias_dtype=case.bias or torch.float32,
            )
            for place, (name, shape) in enumerate(shapes.items())
        }
        self.x = packed.at_odd_address(random(case.hidden), 1)
        angles = case.rotated // 2 if case.shared else case.rotated
        self.cos, self.sin = (torch.randn(angles, generator=generator) for _ in range(2))
        self.q_norm, self.kv_norm = random(max(1, case.ranks)), random(case.latent)
        columns = case.last + 1 + case.spare
        self.latents, self.keys = (
            self._memory(random(columns, width)) for width in (case.latent, case.rotated)
        )
        self.y = torch.full((case.hidden + 32,), OUTSIDE, dtype=dtype)
        self.struct = struct = LatentAttention()
        for name, matrix in self.matrices.items():
            setattr(struct, name, matrix.struct)
        for name in ("heads", "latent", "plain", "rotated", "value", "rotation", "shared"):
            setattr(struct, name, getattr(case, name))
        self.scaling = self._scaling()
        struct.scaling, struct.dtype = self.scaling, DTYPES[dtype]
        struct.q_norm, struct.kv_norm = self.q_norm.data_ptr(), self.kv_norm.data_ptr()
        struct.q_epsilon = struct.kv_epsilon = EPSILON
        self.sequence = Sequence(self.latents.data_ptr(), self.keys.data_ptr(), 0, case.first, case.last)
        self.arguments: dict[str, Any] = {
            "attention": ctypes.byref(struct),
            "x": self.x.data_ptr(),
            "cos": self.cos.data_ptr(),
            "sin": self.sin.data_ptr(),
            "sequences": ctypes.byref(self.sequence),
            "tokens": 1,
            "y": self.y[16:].data_ptr(),
            "activations": FLOATS,
            "threads": 1,
        }

    def _scaling(self) -> float:
        """One that keeps scores near one: the formats' weights are of different sizes."""
        plain, turned = self._queries()
        keys = self._kv_b()[0]
        return float(1 / (torch.einsum("hn,hnl->hl", plain, keys).norm() + turned.norm() + 1e-3))

    def _memory(self, numbers: torch.Tensor) -> torch.Tensor:
        """Theirs where the token sees them, elsewhere NaN, whose sight would spoil all."""
        numbers[: self.case.first] = float("nan")
        numbers[self.case.last :] = float("nan")
        return numbers

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y [D], and the token's latent [latent] and rotated key [rotated], in float64. Keys and values of
        all heads are made from the latents, as transformers does."""
        case = self.case
        plain, turned = self._queries()
        compressed = self.matrices["kv_a"].product(self.x.double()[None])[0]
        latent = _norm(compressed[: case.latent], self.kv_norm)
        key = self._rotate(compressed[None, case.latent :])[0]
        seen = slice(case.first, case.last)
        latents = torch.cat([self.latents[seen].double(), latent[None]])
        turned_keys = torch.cat([self.keys[seen].double(), key[None]])
        of_keys, of_values = self._kv_b()
        keys, values = (torch.einsum("sl,hnl->hsn", latents, part) for part in (of_keys, of_values))
        scores = (keys @ plain[..., None])[..., 0] + turned @ turned_keys.T
        answers = ((scores * self.scaling).softmax(-1)[:, None] @ values)[:, 0]
        return self.matrices["o"].product(answers.reshape(1, -1))[0], latent, key

    def _queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Without and with rotary embedding, [heads, plain] and [heads, rotated]."""
        case, x = self.case, self.x.double()[None]
        if case.ranks:
            x = _norm(self.matrices["q_a"].product(x), self.q_norm)
        queries = self.matrices["q_b"].product(x).view(case.heads, -1)
        return queries[:, : case.plain], self._rotate(queries[:, case.plain :])

    def _kv_b(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of keys and of values, [heads, plain or value, latent]."""
        case = self.case
        both = self.matrices["kv_b"].weights.view(case.heads, case.plain + case.value, case.latent)
        return both[:, : case.plain], both[:, case.plain :]

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """As transformers' apply_rotary_pos_emb, apply_rotary_pos_emb_interleave (APART) or the complex
        product of DeepSeek-V2 (NEIGHBOURS)."""
        case, cos, sin = self.case, self.cos.double(), self.sin.double()
        if case.rotation == APART:
            x = torch.cat([x[:, ::2], x[:, 1::2]], -1)
        if case.rotation == NEIGHBOURS:
            cos, sin = (y.repeat_interleave(2) if case.shared else y for y in (cos, sin))
            turned = torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(1)
        else:
            cos, sin = (torch.cat([y, y]) if case.shared else y for y in (cos, sin))
            first, second = x.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        return x * cos + turned * sin


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()


class Together(attention_calls.Together):
    call = Call

    def answer(self, lib: Any, **changed: Any) -> torch.Tensor:
        """y [tokens, D]."""
        assert lib.moe_latent_attention(*self.arguments(**changed).values()) == 0
        return self.y.clone()

    def forget(self) -> list[torch.Tensor]:
        """What the calls have written to their sequences, which is overwritten."""
        written = [x[call.case.last].clone() for call in self.calls for x in (call.latents, call.keys)]
        for call in self.calls:
            call.latents[call.case.last] = call.keys[call.case.last] = OUTSIDE
        return written
