"""Attention modules that run in the C++ library: which are taken, and that nothing but the time tells."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, apply_rotary_pos_emb, repeat_kv

import moe_local
from moe_local.offload.dense.attention_trial import use_token_attention
from moe_local.offload.dense.norm import use_native_norms
from moe_local.offload.dense.token_attention import TokenAttention
from moe_local.offload.dense.token_latent_attention import TokenLatentAttention
from moe_local.offload.dense.token_layer import TokenLayer
from moe_local.offload.dense.token_layers import TokenLayers
from moe_local.offload.engine.kv_slab import probe_cache
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.native.library import library
from support import tiny_models
from support.variants import others_slow

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

torch.set_num_threads(1)

TAKEN = {
    "mixtral": True,
    "qwen3_moe": True,
    "qwen2_moe": True,
    "olmoe": False,  # norms across all heads
    "granitemoe": True,
    "phimoe": True,
    "gpt_oss": True,
    "qwen3_next": True,  # with gates, and norms with 1 + weight
    "qwen3_5_moe": True,
    "deepseek_v2": True,  # compressed keys and values, here and in the next two
    "deepseek_v3": True,
    "glm4_moe_lite": True,
    "deepseek_v32": False,  # chooses the tokens that it sees
}

IDS = [5, 17, 300, 42, 7, 99, 260, 31, 8, 120, 77, 64]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for each call of the library, for attention alone or with the rest of a layer; layers are not
    computed together."""
    monkeypatch.setattr(TokenLayers, "join", lambda *_: None)
    made: list[Any] = []
    for cls in (TokenAttention, TokenLatentAttention, TokenLayer):
        monkeypatch.setattr(cls, "__call__", noting(made, cls.__call__))
    return made


def noting(made: list[Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def noted(self: Any, *args: Any) -> Any:
        if not (isinstance(self, TokenLayer) and self.struct.delta_net):
            made.append(self)
        return plain(self, *args)

    return noted


def attentions(hf: Any) -> list[Any]:
    return [module for name, module in hf.named_modules() if name.endswith(".self_attn")]


def are_taken(hf: Any) -> list[bool]:
    return ["_token_attention" in vars(module) for module in attentions(hf)]


def slab(hf: Any, capacity: int = 32) -> Any:
    """Memory of one sequence, written in place."""
    kv = make_kv(hf, 1, capacity, probe_cache(hf))
    kv.join()
    return kv


def feed(hf: Any, ids: list[int], kv: Any, **options: Any) -> torch.Tensor:
    """One forward of the next tokens: logits [T, V]."""
    positions = torch.arange(kv.lens[0], kv.lens[0] + len(ids))[None]
    tokens = torch.tensor([ids])
    out = hf(input_ids=tokens, position_ids=positions, past_key_values=kv.row(0), **options)
    kv.advance(0, len(ids))
    return out.logits[0].detach()


def one_by_one(hf: Any, ids: list[int] = IDS) -> torch.Tensor:
    """Logits [T, V] of tokens that come one at a time."""
    kv = slab(hf)
    with torch.no_grad():
        return torch.cat([feed(hf, [token], kv) for token in ids])


@pytest.fixture
def taken() -> Callable[..., tuple[Any, Any]]:
    """taken("mixtral", **config) -> a model as it was, and its copy whose attention runs in the library."""

    def make(model_type: str = "mixtral", **config: Any) -> tuple[Any, Any]:
        plain = tiny_models.tiny_model(model_type, **config).requires_grad_(False)
        hf = copy.deepcopy(plain)
        use_token_attention(hf)
        assert all(are_taken(hf))
        return plain, hf

    return make


def close(got: torch.Tensor, want: torch.Tensor, allowed: float = 2e-4) -> bool:
    return bool((got - want).norm() <= allowed * want.norm())


@pytest.mark.parametrize("family", others_slow(TAKEN, list(TAKEN)[::2]))
def test_a_loaded_model_answers_as_transformers_own(
    make_checkpoint: Callable[..., Path], family: str, calls: list[Any]
) -> None:
    folder = make_checkpoint(family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([IDS])
    with torch.inference_mode():
        want = reference(prompt).logits[0]
        ids = reference.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with moe_local.load(folder, device="cpu", experts="fp32", dense="fp32", context=64) as model:
        hf = model.hf
        layers = len(attentions(reference))
        assert are_taken(hf) == [TAKEN[family]] * layers
        for module, original in zip(attentions(hf), attentions(reference), strict=True):
            assert isinstance(module, type(original))
            assert type(module).__name__ == type(original).__name__
            assert list(module.state_dict()) == list(original.state_dict())
        calls.clear()
        got = model.generate(prompt, max_new_tokens=12, eos_token_id=None)
        assert torch.equal(got, ids)
        assert len(calls) == (layers * 11 if TAKEN[family] else 0)
        assert torch.allclose(one_by_one(hf), want, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "config", "least"),
    [  # where a window hides something, transformers gives a mask, which the original takes
        ("mixtral", {"sliding_window": 4}, 3 * 3),
        ("qwen2_moe", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}, 2 * 12),
        ("qwen3_moe", {"attention_bias": True, "num_key_value_heads": 4}, 3 * 12),
        ("granitemoe", {"attention_multiplier": 0.7}, 3 * 12),
    ],
)
def test_layers_that_see_a_window_biases_and_multipliers(
    taken: Callable[..., tuple[Any, Any]], calls: list[Any], family: str, config: dict[str, Any], least: int
) -> None:
    plain, hf = taken(family, **config)
    with torch.no_grad():
        want = plain(torch.tensor([IDS])).logits[0]
    calls.clear()
    assert close(one_by_one(hf), want, 1e-5)
    assert least <= len(calls) <= 3 * len(IDS)


class Variant(MixtralAttention):  # type: ignore[misc]
    """MixtralAttention, written out for subclasses to differ in a detail."""

    def project(self, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q, k, v

    def rotate(self, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        rotated: tuple[Any, Any] = apply_rotary_pos_emb(q, k, cos, sin)
        return rotated

    def score(self, scores: Any, position_ids: Any) -> Any:
        return scores

    def forward(
        self,
        hidden_states: Any,
        position_embeddings: Any,
        attention_mask: Any = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, None]:
        cache = past_key_values if cache is None else cache
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projected = (getattr(self, name)(hidden_states) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (x.view(shape).transpose(1, 2) for x in self.project(*projected))
        q, k = self.rotate(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        k, v = (repeat_kv(x, self.num_key_value_groups) for x in (k, v))
        scores = self.score(q @ k.transpose(2, 3) * self.scaling, kwargs.get("position_ids"))
        heads = scores.softmax(-1) @ v
        return self.o_proj(heads.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


class Clipped(Variant):
    def project(self, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q.clamp(-8, 8), k.clamp(-8, 8), v.clamp(-8, 8)


class ClippedValues(Variant):
    def project(self, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q, k, v.clamp(-30, 30)


class NormedValues(Variant):
    def project(self, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        return q, k, v * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Capped(Variant):
    def score(self, scores: Any, position_ids: Any) -> Any:
        return (scores / 50).tanh() * 50


class FarScaled(Variant):
    """As Llama 4: scores of far positions are larger."""

    def score(self, scores: Any, position_ids: Any) -> Any:
        return scores * (1 + 0.1 * torch.log1p(torch.floor((position_ids + 1.0) / 16384))).to(scores.dtype)


class FarRotated(Variant):
    def rotate(self, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        return super().rotate(q, k, -cos, sin)


class Unrotated(Variant):
    def rotate(self, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
        return q, k


class Biased(Variant):
    """Like ALiBi: nearer positions count for more."""

    def score(self, scores: Any, position_ids: Any) -> Any:
        return scores + 0.5 * torch.arange(scores.shape[-1], dtype=scores.dtype)


class ByLayer(Variant):
    """As GPT-2 can be told to: layers look alike and differ by their number."""

    def score(self, scores: Any, position_ids: Any) -> Any:
        return scores / (1 + (self.layer_idx == 2))


VARIANTS: dict[type[Variant], list[bool]] = {
    Variant: [True] * 3,
    **dict.fromkeys((Clipped, ClippedValues, NormedValues, Capped, FarScaled, FarRotated), [False] * 3),
    **dict.fromkeys((Unrotated, Biased), [False] * 3),
    ByLayer: [True, True, False],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_computes_something_else_is_not_taken(variant: type[Variant], dtype: torch.dtype) -> None:
    hf = tiny_models.tiny_model("mixtral").requires_grad_(False).to(dtype)
    for module in attentions(hf):
        module.__class__ = variant
    use_token_attention(hf)
    assert are_taken(hf) == VARIANTS[variant]


def test_heads_between_two_positions_are_no_difference() -> None:
    """In 16 bits either of two nearly equal scores may win a head: of 24 layers one or the other has such."""
    sizes = {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4}
    hf = tiny_models.tiny_model("qwen3_moe", **sizes).requires_grad_(False).to(torch.bfloat16)
    use_native_norms(hf)
    use_token_attention(hf)
    assert all(are_taken(hf))


def change_values(module: Any) -> None:
    """Values of another width than keys."""
    module.v_proj = nn.Linear(64, 64, bias=False)
    module.o_proj = nn.Linear(128, 64, bias=False)


def add_norm(module: Any) -> None:
    module.o_norm = nn.LayerNorm(64)


def add_parameter(module: Any) -> None:
    module.slopes = nn.Parameter(torch.ones(4))


def mix_dtypes(module: Any) -> None:
    module.o_proj = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)


def transpose_weight(module: Any) -> None:
    module.q_proj.weight = nn.Parameter(module.q_proj.weight.T.contiguous().T)


@pytest.mark.parametrize("change", [change_values, add_norm, add_parameter, mix_dtypes, transpose_weight])
def test_what_is_built_otherwise_is_not_taken(change: Callable[[Any], None]) -> None:
    module = attentions(tiny_models.tiny_model("mixtral"))[0]
    assert TokenAttention.of(module, torch.float32) is not None
    assert TokenAttention.of(module, torch.float64) is None
    change(module)
    assert TokenAttention.of(module, torch.float32) is None


def test_gates_of_another_kind_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_models.tiny_model("qwen3_next").requires_grad_(False)
    use_native_norms(hf)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "sigmoid", torch.tanh)
        use_token_attention(hf)
        assert are_taken(hf) == [False]
    use_token_attention(hf)
    assert are_taken(hf) == [True]


@contextlib.contextmanager
def in_bf16() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


def masked(hf: Any) -> torch.Tensor:
    kv = slab(hf)
    feed(hf, IDS[:3], kv)
    mask = torch.zeros(1, 1, 1, 4)
    mask[..., 1] = -1e9
    return feed(hf, IDS[3:4], kv, attention_mask=mask)


def with_own_cache(hf: Any) -> torch.Tensor:
    first = hf(torch.tensor([IDS[:3]]), use_cache=True)
    logits: torch.Tensor = hf(torch.tensor([IDS[3:4]]), past_key_values=first.past_key_values).logits
    return logits


def with_gradients(hf: Any) -> torch.Tensor:
    with torch.enable_grad():
        kv = slab(hf)
        x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        hf(inputs_embeds=x, past_key_values=kv.row(0)).logits.sum().backward()
    gradient: torch.Tensor = x.grad  # type: ignore[assignment]
    return gradient


def shown(hf: Any) -> torch.Tensor:
    hf.set_attn_implementation("eager")
    out = hf(torch.tensor([IDS[:1]]), past_key_values=slab(hf).row(0), output_attentions=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(1, 4, 1, 1)] * 3
    return torch.cat([weights.flatten() for weights in out.attentions])


def trained(hf: Any) -> torch.Tensor:
    hf.train()
    torch.manual_seed(0)
    logits = feed(hf, IDS[:1], slab(hf))
    hf.eval()
    return logits


ELSEWHERE: dict[str, Callable[[Any], torch.Tensor]] = {
    "batch": lambda hf: hf(torch.tensor([IDS[:1], IDS[1:2]])).logits,
    "tokens": lambda hf: feed(hf, IDS[:3], slab(hf)),
    "mask": masked,
    "cache of transformers": with_own_cache,
    "no cache": lambda hf: hf(torch.tensor([IDS[:1]]), use_cache=False).logits,
    "gradients": with_gradients,
    "eager": shown,
    "training": trained,
}


@pytest.mark.parametrize("way", [*ELSEWHERE, "autocast"])
def test_all_else_is_left_to_the_original(
    taken: Callable[..., tuple[Any, Any]], calls: list[Any], way: str
) -> None:
    plain, hf = taken(attention_dropout=0.5 if way == "training" else 0.0)
    calls.clear()
    run = ELSEWHERE.get(way, lambda hf: feed(hf, IDS[:1], slab(hf)))
    with in_bf16() if way == "autocast" else torch.no_grad():
        assert torch.equal(run(hf), run(plain))
    assert not calls
    hf.set_attn_implementation("sdpa")
    one_by_one(hf)
    assert calls


def test_a_full_cache_is_an_error_and_not_written_beyond(taken: Callable[..., tuple[Any, Any]]) -> None:
    _, hf = taken()
    kv = slab(hf, 3)
    with torch.no_grad():
        for token in IDS[:3]:
            feed(hf, [token], kv)
        with pytest.raises(RuntimeError, match="exceeds"):
            feed(hf, IDS[3:4], kv)
