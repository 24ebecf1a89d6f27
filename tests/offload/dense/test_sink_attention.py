"""Attention with sinks against transformers' own, and in a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import moe_local
from moe_local.offload.dense import sink_attention as module_under_test
from moe_local.offload.dense.sink_attention import (
    NAME,
    WITH_ADDED_MASK,
    sink_attention,
    use_sink_attention,
)
from moe_local.offload.modeling.names import cache_name
from support import attention_checks, tiny_models


def inputs(
    heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(keys)
    shapes = [(2, heads, queries, 16), *[(2, heads // groups, keys, 16)] * 2]
    drawn = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(dtype) for x in drawn], torch.randn(heads, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (4, 1), (6, 3), (4, 4)])
@pytest.mark.parametrize(
    ("queries", "keys", "masked"),
    [(1, 1, False), (1, 77, False), (1, 77, True), (5, 5, False), (5, 5, True), (3, 40, True)],
)
def test_equals_transformers_eager_attention(
    attends: str, queries: int, keys: int, masked: bool, heads: int, groups: int, dtype: torch.dtype
) -> None:
    (query, key, value), sinks = inputs(heads, groups, queries, keys, dtype)
    module: Any = SimpleNamespace(num_key_value_groups=groups, sinks=sinks, training=False)
    seen = torch.ones(2, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    if masked:  # each of the batch sees other keys, as in a window
        seen &= torch.ones_like(seen).triu(torch.tensor(keys - queries - 20))
        seen[1, :, :, : keys // 3] &= torch.eye(queries, keys // 3, dtype=torch.bool)
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    want, _ = eager_attention_forward(module, *(x.double() for x in (query, key, value)), added.double(), 0.3)
    got, scores = sink_attention(
        module, query, key, value, seen if masked else None, scaling=0.3, s_aux=sinks, sliding_window=None
    )
    assert scores is None
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert got.is_contiguous()
    assert (got - want).norm() <= (1e-6 if dtype == torch.float32 else 6e-3) * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 4])
def test_who_sees_nothing_spoils_nothing(attends: str, queries: int, dtype: torch.dtype) -> None:
    """Padding before a prompt: its answers matter to nobody, but come back as keys."""
    (query, key, value), sinks = inputs(8, 4, queries, 40, dtype)
    seen = torch.ones(2, 1, queries, 40, dtype=torch.bool)
    seen[0] = False
    module: Any = SimpleNamespace(num_key_value_groups=4)
    got, _ = sink_attention(module, query, key, value, seen, scaling=0.3, s_aux=sinks)
    want, _ = sink_attention(module, query, key, value, seen | True, scaling=0.3, s_aux=sinks)
    assert got.isfinite().all()
    assert torch.equal(got[1], want[1])


def test_no_scores_are_kept(attends: str) -> None:
    (query, key, value), sinks = inputs(8, 4, 64, 512, torch.float32)
    seen = torch.ones(1, 1, 64, 512, dtype=torch.bool).tril(448)
    module: Any = SimpleNamespace(num_key_value_groups=4)
    with attention_checks.Largest() as largest:
        sink_attention(module, query, key, value, seen, scaling=0.3, s_aux=sinks)
    answers, keys = 2 * 8 * 64 * 16, 2 * 8 * 512 * 16
    assert largest.numel == (answers if attends == "library" else keys)  # torch's: for every head
    with attention_checks.Largest() as largest:
        sink_attention(module, query[:, :, :1], key, value, seen[:, :, -1:], scaling=0.3, s_aux=sinks)
    assert largest.numel <= 1024  # the mask, the answers


def test_layers_without_sinks_are_as_with_sdpa() -> None:
    (query, key, value), _ = inputs(4, 2, 5, 5, torch.float32)
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    got, _ = sink_attention(module, query, key, value, None, scaling=0.3, s_aux=None)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    assert torch.allclose(got, want.transpose(1, 2), atol=1e-6)


def test_a_loaded_model_attends_by_it(make_checkpoint: Callable[..., Path]) -> None:
    """Past a window of 16, in chunks of a prompt, single tokens, and rows of a batch of several lengths."""
    folder = make_checkpoint("gpt_oss", sliding_window=16)
    plain = tiny_models.tiny_model("gpt_oss", sliding_window=16)
    with moe_local.load(folder, device="cpu", experts="fp32", context=128, parallel=2) as model:
        assert plain.config._attn_implementation == "eager"
        assert model.hf.config._attn_implementation == NAME
        attention_checks.check_ids(model, plain)


@pytest.mark.parametrize("broken", ["raises", "differs"])
def test_a_model_that_comes_out_different_stays_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def attend(*args: Any) -> Any:
        if broken == "raises":
            raise RuntimeError("no kernel for this card\nand more")
        output, logsumexp = attended(*args)
        return output, logsumexp + 1

    attended = module_under_test.attend
    monkeypatch.setattr(module_under_test, "attend", attend)
    caplog.set_level("INFO", "moe_local")
    hf = tiny_models.tiny_model("gpt_oss")
    use_sink_attention(hf)
    assert hf.config._attn_implementation == "eager"
    assert (
        "attention stays eager: " + {"raises": "RuntimeError: no kernel", "differs": "logits"}[broken]
        in caplog.text
    )
    monkeypatch.undo()
    use_sink_attention(hf)
    assert hf.config._attn_implementation == NAME


def test_autocast_is_followed() -> None:
    hf = tiny_models.tiny_model("gpt_oss")
    found = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(hf(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.float())
        use_sink_attention(hf)
    assert hf.config._attn_implementation == NAME
    assert (found[0] - found[1]).norm() <= 0.03 * found[0].norm()


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 4)])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_is_added_to_scores_is_a_mask_too(queries: int, heads: int, groups: int) -> None:
    (query, key, value), sinks = inputs(heads, groups, queries, 40, torch.float32)
    module: Any = SimpleNamespace(num_key_value_groups=groups)
    seen = torch.rand(2, 1, queries, 40, generator=torch.Generator().manual_seed(2)) < 0.5
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    got, want = (
        sink_attention(module, query, key, value, mask, scaling=0.3, s_aux=sinks)[0] for mask in (added, seen)
    )
    assert torch.equal(got, want)
    half, _ = sink_attention(module, query, key, value, added + 0.5, scaling=0.3, s_aux=sinks + 0.5)
    torch.testing.assert_close(half, want)


@pytest.mark.parametrize("cuts", [[], [25, 26]])
def test_attention_that_adds_to_its_mask_is_the_same(cuts: list[int]) -> None:
    """DeepSeek-V4's, past its window of 16 and behind compressed tokens."""
    hf = tiny_models.tiny_model("deepseek_v4", num_attention_heads=8)
    ids, found = torch.arange(3, 63)[None], []
    for _ in range(2):
        memory = {cache_name(hf.forward): DynamicCache(config=hf.config), "use_cache": True}
        with torch.no_grad():
            parts = [hf(input_ids=part, **memory).logits for part in ids.tensor_split(cuts, dim=1)]
        found.append(torch.cat(parts, dim=1))
        use_sink_attention(hf)
    assert hf.config._attn_implementation == WITH_ADDED_MASK
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_masks_that_it_would_misread_are_refused() -> None:
    (query, key, value), sinks = inputs(8, 4, 3, 40, torch.float32)
    module: Any = SimpleNamespace(num_key_value_groups=4)
    with pytest.raises(ValueError, match="3 queries of 40 keys have no mask"):
        sink_attention(module, query, key, value, None, s_aux=sinks)


def test_models_of_other_attention_are_left_alone() -> None:
    """Without sinks."""
    for name in ("mixtral", "deepseek_v32"):
        hf = tiny_models.tiny_model(name)
        before = hf.config._attn_implementation
        use_sink_attention(hf)
        assert hf.config._attn_implementation == before
