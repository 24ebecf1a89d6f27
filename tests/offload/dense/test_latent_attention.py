"""Latent attention of single tokens against transformers' own, and in a loaded model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_execution_device_hook
from transformers import DynamicCache

import moe_local
from moe_local.offload.dense import latent_attention as module_under_test
from moe_local.offload.dense.attention import NAME as SINGLE_QUERY
from moe_local.offload.dense.attention import use_single_query_attention
from moe_local.offload.dense.latent_attention import FROM, NAME, latent, use_latent_attention
from moe_local.offload.dense.linear import QuantizedLinear
from moe_local.offload.gpu.card_moves import move_between_cards
from moe_local.offload.modeling.names import cache_name
from support import attention_checks, tiny_models

FAMILIES = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"]
CHOOSING = ["deepseek_v32", "glm_moe_dsa"]
"""Families that choose some tokens and see these only."""


@pytest.fixture(params=FAMILIES)
def hf(request: pytest.FixtureRequest) -> Any:
    model = tiny_models.tiny_model(request.param)
    use_single_query_attention(model)
    use_latent_attention(model)
    assert model.config._attn_implementation == NAME
    return model


def answers(
    hf: Any, mask: torch.Tensor | None, *, absorbed: bool, tokens: int = 1, behind: int = 40
) -> torch.Tensor:
    """Of the first layer's attention to `tokens` of two sequences, `behind` others."""
    hf.set_attn_implementation(NAME if absorbed else SINGLE_QUERY)
    module = hf.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(hf.dtype)

    cache = DynamicCache()
    if behind:
        before = draw(2, 1, behind, module.kv_lora_rank), draw(2, 1, behind, module.qk_rope_head_dim)
        cache.update(*before, 0)
    hidden = draw(2, tokens, hf.config.hidden_size)
    with torch.no_grad():
        angles = hf.model.rotary_emb(hidden, torch.arange(behind, behind + tokens).expand(2, -1))
        options = {"position_embeddings": angles, "attention_mask": mask, cache_name(hf.forward): cache}
        output: torch.Tensor = module(hidden_states=hidden, **options)[0]
    assert output.shape == hidden.shape
    assert output.dtype == hf.dtype
    assert cache.layers[0].keys.shape[2] == behind + tokens
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "seen", "added"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_are_answered_as_by_transformers(
    hf: Any, tokens: int, mask: str, dtype: torch.dtype
) -> None:
    """Without a mask several tokens are all that there are."""
    hf.to(dtype)
    behind = 0 if mask == "none" and tokens > 1 else 40
    seen = torch.rand(2, 1, tokens, 40 + tokens, generator=torch.Generator().manual_seed(1)) < 0.4
    seen[..., -tokens:] = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    given = {"none": None, "seen": seen, "added": added}[mask]
    want, got = (
        answers(hf, given, absorbed=absorbed, tokens=tokens, behind=behind) for absorbed in (False, True)
    )
    assert not torch.equal(got, want)  # another way, indeed
    assert (got - want).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * want.norm()


def test_who_sees_nothing_spoils_nothing(hf: Any) -> None:
    """Padding before a prompt: its answers matter to nobody, but come back as keys."""
    seen = torch.zeros(2, 1, 1, 41, dtype=torch.bool)
    seen[1] = True
    want, got = (answers(hf, seen, absorbed=absorbed) for absorbed in (False, True))
    assert got.isfinite().all()
    assert torch.allclose(got[1], want[1], atol=1e-5)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantized_matrices_are_decoded_where_that_takes_less(hf: Any, format: str) -> None:
    for layer in hf.model.layers:
        original = layer.self_attn.kv_b_proj
        linear = layer.self_attn.kv_b_proj = QuantizedLinear(original, format)
        linear.weight = linear.quantized("weight", original.weight)
    for behind in (FROM - 2, FROM - 1):
        want, got = (answers(hf, None, absorbed=absorbed, behind=behind) for absorbed in (False, True))
        assert torch.equal(got, want) == (behind < FROM - 1)
        assert (got - want).norm() <= 1e-4 * want.norm()


def test_hooks_that_move_tensors_from_card_to_card_are_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of accelerate put a forward into each module, which would hide that of its new class."""
    calls: list[Any] = []
    true_matrix = module_under_test._matrix
    monkeypatch.setattr(
        module_under_test, "_matrix", lambda *args: calls.append(args[0]) or true_matrix(*args)
    )
    hf = tiny_models.tiny_model("deepseek_v3")
    attach_execution_device_hook(hf, "cpu")
    move_between_cards(hf, {"model": "cpu", "lm_head": "cpu"})
    use_single_query_attention(hf)
    use_latent_attention(hf)
    assert hf.config._attn_implementation == NAME
    calls.clear()
    with torch.no_grad():
        hf(input_ids=torch.tensor([[5]]))
    assert len(calls) == hf.config.num_hidden_layers


def test_a_matrix_of_another_kind_is_left_to_transformers(hf: Any) -> None:
    module = hf.model.layers[0].self_attn
    want = answers(hf, None, absorbed=False)
    module.kv_b_proj.bias = torch.nn.Parameter(torch.zeros(module.kv_b_proj.out_features))
    assert torch.equal(answers(hf, None, absorbed=True), want)


def test_a_matrix_with_more_than_its_product_is_left_to_transformers(hf: Any) -> None:
    """LoRA's subclasses, and a forward that somebody has replaced."""

    class More(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    linear = torch.nn.Linear(8, 4, bias=False)
    assert module_under_test._is_known(linear)
    assert not module_under_test._is_known(More(8, 4, bias=False))
    linear.forward = lambda x: x  # type: ignore[method-assign]
    assert not module_under_test._is_known(linear)


def test_nothing_is_made_for_every_head(hf: Any) -> None:
    module = hf.model.layers[0].self_attn
    heads = hf.config.num_attention_heads
    found = {}
    for absorbed in (False, True):
        with attention_checks.Largest() as largest:
            answers(hf, None, absorbed=absorbed)
        found[absorbed] = largest.numel
    assert found[False] >= 2 * heads * 41 * module.v_head_dim
    assert found[True] < found[False]


def test_long_prompts_and_gradients_go_transformers_way(hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hf.set_attn_implementation(NAME)
    cls = type(hf.model.layers[0].self_attn).__mro__[1]
    original = cls.expand_kv

    def noted(self: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> Any:
        calls.append(kv_nope.shape[2])
        return original(self, kv_nope, k_rot)

    monkeypatch.setattr(cls, "expand_kv", noted)
    with torch.no_grad():
        few = module_under_test._few(hf.model.layers[0].self_attn)
        for tokens in (1, few):
            hf(input_ids=torch.arange(tokens)[None] + 5)
        assert not calls
        hf(input_ids=torch.arange(few + 1)[None] + 5)
    hf(input_ids=torch.tensor([[5]]))
    layers = hf.config.num_hidden_layers
    assert few > 1
    assert calls == [few + 1] * layers + [1] * layers


@pytest.mark.parametrize("added", [False, True])
def test_what_was_not_chosen_is_not_seen(added: bool) -> None:
    mask = torch.tensor([True, True, False, True, True]).view(1, 1, 1, 5)
    if added:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -7.0)
    got = module_under_test._chosen(mask, torch.tensor([[[0, 2, 4]]]))
    least = torch.finfo(torch.float32).min
    assert got.flatten().tolist() == (
        [0, least, -7, least, 0] if added else [True, False, False, False, True]
    )


def test_copies_and_pickles_stay_what_they_are(hf: Any) -> None:
    module = hf.model.layers[0].self_attn
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module) is latent(type(module).__mro__[1])


@pytest.mark.parametrize("family", [*FAMILIES, *CHOOSING])
def test_a_loaded_model_answers_as_transformers_own(
    make_checkpoint: Callable[..., Path], family: str
) -> None:
    """Single tokens, and rows of a batch of several lengths."""
    plain = tiny_models.tiny_model(family)
    memory = DynamicCache(config=plain.config)
    plain(input_ids=torch.tensor([[5]]), **{cache_name(plain.forward): memory})
    kept = memory.layers[0].keys.shape[1]  # transformers 5.17 keeps keys of all heads for those that choose
    with moe_local.load(
        make_checkpoint(family), device="cpu", experts="fp32", context=128, parallel=2
    ) as model:
        uses = model.hf.config._attn_implementation == NAME
        assert uses == (kept == 1)
        attention_checks.check_ids(model, plain)


@pytest.mark.parametrize("broken", ["raises", "differs"])
def test_a_model_that_comes_out_different_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def matrix(*args: Any) -> torch.Tensor:
        if broken == "raises":
            raise RuntimeError("no such kernel\nand more")
        return true_matrix(*args).flip(0)

    true_matrix = module_under_test._matrix
    monkeypatch.setattr(module_under_test, "_matrix", matrix)
    caplog.set_level("INFO", "moe_local")
    hf = tiny_models.tiny_model("deepseek_v3")
    use_single_query_attention(hf)
    before = [type(layer.self_attn) for layer in hf.model.layers]
    use_latent_attention(hf)
    assert hf.config._attn_implementation == SINGLE_QUERY
    assert [type(layer.self_attn) for layer in hf.model.layers] == before
    reason = {"raises": "RuntimeError: no such kernel", "differs": "logits were off by"}[broken]
    assert f"made for every token: {reason}" in caplog.text
    monkeypatch.undo()
    use_latent_attention(hf)
    assert hf.config._attn_implementation == NAME


def test_other_models_are_left_alone() -> None:
    for name in ("mixtral", "gpt_oss"):
        hf = tiny_models.tiny_model(name)
        use_single_query_attention(hf)
        before = hf.config._attn_implementation, type(hf.model.layers[0].self_attn)
        use_latent_attention(hf)
        assert before == (hf.config._attn_implementation, type(hf.model.layers[0].self_attn))
