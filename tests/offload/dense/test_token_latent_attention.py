"""Latent attention in the C++ library: what is not taken, quantized weights, several sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import moe_local
from moe_local.offload.dense.attention import use_single_query_attention
from moe_local.offload.dense.attention_trial import use_token_attention
from moe_local.offload.dense.latent_attention import use_latent_attention
from moe_local.offload.dense.token_latent_attention import TokenLatentAttention
from moe_local.offload.dense.token_layer import TokenLayer
from moe_local.offload.native.library import library
from support import tiny_models
from support.single_tokens import one_by_one, quantize

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

IDS = [5, 17, 300, 42, 7, 99, 260, 31]


def attentions(hf: Any) -> list[Any]:
    return [layer.self_attn for layer in hf.model.layers]


def are_taken(hf: Any) -> list[bool]:
    return ["_token_attention" in vars(module) for module in attentions(hf)]


class Scaled(DeepseekV3Attention):  # type: ignore[misc]
    """As LongCat: latents are larger where they are expanded."""

    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> Any:
        return super().expand_kv(2 * kv_nope, k_rot)


class ScaledKeys(DeepseekV3Attention):  # type: ignore[misc]
    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> Any:
        keys, values = super().expand_kv(kv_nope, k_rot)
        return 1.5 * keys, values


class Clipped(DeepseekV3Attention):  # type: ignore[misc]
    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> Any:
        keys, values = super().expand_kv(kv_nope, k_rot)
        return keys, values.clamp(-1, 1)


class Unrotated(DeepseekV3Attention):  # type: ignore[misc]
    """As Kimi-Linear."""

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any, *args: Any, **kwargs: Any
    ) -> Any:
        cos, sin = position_embeddings
        angles = torch.ones_like(cos), torch.zeros_like(sin)
        return super().forward(hidden_states, angles, *args, **kwargs)


class FarScaled(DeepseekV3Attention):  # type: ignore[misc]
    """As Mistral 4: queries of far positions are larger."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        place = kwargs["position_ids"]
        factor = 1 + 0.1 * torch.log1p(torch.floor(place[..., None] / 16384)).to(hidden_states.dtype)
        hook = self.q_b_proj.register_forward_hook(lambda module, args, output: factor * output)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [DeepseekV3Attention, Scaled, ScaledKeys, Clipped, Unrotated, FarScaled])
def test_what_computes_something_else_is_not_taken(variant: type[Any], dtype: torch.dtype) -> None:
    hf = tiny_models.tiny_model("deepseek_v3").requires_grad_(False).to(dtype)
    for module in attentions(hf):
        module.__class__ = variant
    use_token_attention(hf)
    assert are_taken(hf) == [variant is DeepseekV3Attention] * len(hf.model.layers)


def add_norm(module: Any) -> None:
    module.o_norm = nn.LayerNorm(64)


def add_parameter(module: Any) -> None:
    module.slopes = nn.Parameter(torch.ones(4))


def mix_dtypes(module: Any) -> None:
    module.o_proj = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)


def add_bias(module: Any) -> None:
    module.kv_b_proj = nn.Linear(32, 128)


def change_heads(module: Any) -> None:
    module.kv_b_proj = nn.Linear(32, 96, bias=False)


def change_ranks(module: Any) -> None:
    module.q_a_proj = nn.Linear(64, 48, bias=False)


def change_norm(module: Any) -> None:
    module.kv_a_layernorm = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [add_norm, add_parameter, mix_dtypes, add_bias, change_heads, change_ranks, change_norm],
)
def test_what_is_built_otherwise_is_not_taken(change: Callable[[Any], None]) -> None:
    module = attentions(tiny_models.tiny_model("deepseek_v3"))[0]
    assert TokenLatentAttention.of(module, torch.float32) is not None
    assert TokenLatentAttention.of(module, torch.float64) is None
    change(module)
    assert TokenLatentAttention.of(module, torch.float32) is None


def test_queries_in_one_step() -> None:
    """As in DeepSeek-V2-Lite."""
    plain = tiny_models.tiny_model("deepseek_v2", q_lora_rank=None).requires_grad_(False)
    hf = tiny_models.tiny_model("deepseek_v2", q_lora_rank=None).requires_grad_(False)
    use_token_attention(hf)
    assert all(are_taken(hf))
    with torch.no_grad():
        want = plain(torch.tensor([IDS])).logits[0]
    got = one_by_one(hf, IDS)
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_quantized_weights_are_read_in_place(family: str, format: str) -> None:
    plain = tiny_models.tiny_model(family).requires_grad_(False)
    hf = tiny_models.tiny_model(family).requires_grad_(False)
    use_single_query_attention(hf)
    use_latent_attention(hf)
    quantize(attentions(plain), attentions(hf), format)
    use_token_attention(hf)
    assert all(are_taken(hf))
    with torch.no_grad():
        want = plain(torch.tensor([IDS])).logits[0]
    got = one_by_one(hf, IDS)
    assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_several_sequences_are_answered_together(
    make_checkpoint: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of several lengths, and get the ids that each gets alone; not in one call with layers."""
    monkeypatch.setattr(TokenLayer, "of", lambda module: None)
    counts: list[int] = []
    plain = TokenLatentAttention.__call__

    def noted(self: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        counts.append(len(x))
        return plain(self, x, *args)

    monkeypatch.setattr(TokenLatentAttention, "__call__", noted)
    prompts = [torch.tensor([ids]) for ids in (IDS[:3], IDS, IDS[2:7])]
    width = len(IDS)
    rows = [torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts]
    mask = torch.cat([torch.arange(width)[None] >= width - prompt.shape[1] for prompt in prompts]).long()
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None}
    folder = make_checkpoint(family)
    with moe_local.load(folder, device="cpu", experts="fp32", dense="fp32", context=64, parallel=3) as model:
        alone = [model.generate(prompt, **options)[0, -10:] for prompt in prompts]
        assert set(counts) == {1}
        counts.clear()
        together = model.generate(torch.cat(rows), attention_mask=mask, **options)[:, -10:]
        assert torch.equal(together, torch.stack(alone))
        assert max(counts) == 3
