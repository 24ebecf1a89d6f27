"""Single-query attention against transformers' own sdpa, and in a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import moe_local
from moe_local.offload.dense import attention
from moe_local.offload.dense.attention import NAME, single_query_attention
from moe_local.offload.modeling.masks import single_query_mask
from moe_local.offload.modeling.names import cache_name
from support import tiny_models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (8, 1), (6, 3), (4, 4)])
@pytest.mark.parametrize(("queries", "positions"), [(1, 1), (1, 77), (5, 5), (3, 9)])
def test_equals_transformers_sdpa(
    attends: str, queries: int, positions: int, heads: int, groups: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(positions)
    shapes = [
        (2, heads, queries, 16),
        (2, heads // groups, positions, 16),
        (2, heads // groups, positions, 24),
    ]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    module: Any = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    mask = None
    if queries not in (1, positions):
        mask = torch.ones(2, 1, queries, positions, dtype=torch.bool).tril(positions - queries)
    want, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    got, weights = single_query_attention(module, query, key, value, mask, scaling=0.3)
    assert weights is None
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert torch.allclose(got, want, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("added", [False, True])
def test_a_masked_query_copies_no_keys(added: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask of booleans or of numbers, one for all heads; not with one for each."""
    given: list[tuple[int, ...]] = []
    plain: Callable[..., torch.Tensor] = attention.F.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        given.append((*query.shape[1:3], key.shape[1]))
        return plain(query, key, *args, **options)

    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, h, n, 16, generator=generator) for h, n in ((8, 1), (2, 77), (2, 77)))
    mask: torch.Tensor = torch.rand(2, 1, 1, 77, generator=generator) < 0.5
    if added:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    module: Any = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    repeated = [x.repeat_interleave(4, dim=1) for x in (key, value)]
    want = plain(query, *repeated, attn_mask=mask).transpose(1, 2)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    got, _ = single_query_attention(module, query, key, value, mask)
    assert torch.allclose(got, want, atol=1e-6)
    assert given == [(2, 4, 2)]
    got, _ = single_query_attention(module, query, key, value, mask.expand(2, 8, 1, 77))
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.usefixtures("torch_attends")
@pytest.mark.parametrize("queries", [1, 5])
def test_keys_are_copied_where_no_kernel_shares_them(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without flash attention: but for one query, which is packed."""
    given: list[tuple[int, ...]] = []
    plain: Callable[..., torch.Tensor] = attention.F.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        given.append((*query.shape[1:3], key.shape[1]))
        assert not options.get("enable_gqa")
        return plain(query, key, *args, **options)

    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 8, queries, 16), (2, 2, 5, 16), (2, 2, 5, 16)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    module: Any = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    want, _ = sdpa_attention_forward(module, query, key, value, None)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(attention, "_shares_keys", lambda *tensors: False)
    got, _ = single_query_attention(module, query, key, value, None)
    assert torch.allclose(got, want, atol=1e-6)
    assert given == [(2, 4, 2) if queries == 1 else (8, 5, 8)]


@pytest.mark.usefixtures("torch_attends")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "seen", "added"])
@pytest.mark.parametrize(
    ("queries", "widths"), [(9, (24, 16)), (600, (48, 16)), (1, (24, 16)), (9, (16, 24))]
)
def test_narrow_values_get_the_width_that_the_kernel_takes(
    queries: int, widths: tuple[int, int], mask: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    plain: Callable[..., torch.Tensor] = attention.F.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> Any:
        given.append((key.shape[-1], value.shape[-1]))
        return plain(query, key, value, *args, **options)

    generator = torch.Generator().manual_seed(5)
    key_width, width = widths
    query, key, value = (
        torch.randn(2, 4, queries, n, generator=generator).to(dtype) for n in (key_width, key_width, width)
    )
    module: Any = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    seen = torch.ones(2, 1, queries, queries, dtype=torch.bool).tril()
    seen[1, :, :, queries // 3 :: 5] = False
    seen[:, :, :, 0] = True
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    behind = {"none": None, "seen": seen, "added": added}[mask]
    want, _ = sdpa_attention_forward(module, query, key, value, behind)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    got, _ = single_query_attention(module, query, key, value, behind)
    assert got.shape == want.shape == (2, queries, 4, width)
    assert torch.allclose(got, want, atol=1e-5 if dtype == torch.float32 else 3e-2)
    assert set(given) == {(key_width, max(widths) if queries > 1 else width)}


def test_a_loaded_model_attends_by_it(tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[tuple[int, ...]] = []
    plain: Callable[..., torch.Tensor] = attention.F.scaled_dot_product_attention

    def noted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        packed.append(tuple(query.shape))
        return plain(query, *args, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    with moe_local.load(tiny_mixtral, device="cpu", experts="fp32") as model:
        packed.clear()
        config = model.hf.config
        assert config._attn_implementation == NAME
        # by transformers' own loop, whose caches the library does not write to
        model.hf.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    kv_heads = config.num_key_value_heads
    groups = config.num_attention_heads // kv_heads
    assert groups > 1
    single = (1, kv_heads, groups, packed[-1][-1])
    assert packed[config.num_hidden_layers :] == [single] * (2 * config.num_hidden_layers)


def hidden_keys(mask: torch.Tensor) -> list[bool]:
    """Of the last query of the first sequence."""
    assert mask.dtype == torch.bfloat16
    assert set(mask.unique().tolist()) == {0, torch.finfo(torch.bfloat16).min}
    return (mask[0, 0, -1] != 0).tolist()


def test_a_single_query_is_told_what_is_added_to_its_scores() -> None:
    """Only where transformers makes a mask at all."""
    options = {"batch_size": 1, "kv_length": 6, "dtype": torch.bfloat16}
    padded = torch.tensor([[False, True, True, True, True, True]])
    several = single_query_mask(q_length=2, q_offset=4, attention_mask=padded, **options)
    assert several is not None
    assert several.dtype == torch.bool
    assert single_query_mask(q_length=1, q_offset=5, **options) is None
    one = single_query_mask(q_length=1, q_offset=5, attention_mask=padded, **options)
    assert one is not None
    assert one.shape == (1, 1, 1, 6)
    assert hidden_keys(one) == [True, False, False, False, False, False]
    static = single_query_mask(q_length=1, q_offset=torch.tensor(2), allow_is_causal_skip=False, **options)
    assert static is not None
    assert hidden_keys(static) == [False] * 3 + [True] * 3


def test_a_models_single_tokens_get_one_mask_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As numbers, whichever layer attends to them, and with transformers' own logits."""
    ids = torch.arange(3, 20).view(1, -1)
    seen = torch.ones_like(ids)
    seen[:, :4] = 0
    masks: list[Any] = []
    plain: Callable[..., torch.Tensor] = attention.F.scaled_dot_product_attention

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        masks.append(options["attn_mask"])
        return plain(*args, **options)

    found = []
    for own in (False, True):
        hf = tiny_models.tiny_model("mixtral")
        memory = {cache_name(hf.forward): DynamicCache(config=hf.config), "use_cache": True}
        if own:
            attention.use_single_query_attention(hf)
            monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
        with torch.no_grad():
            hf(input_ids=ids[:, :-1], attention_mask=seen[:, :-1], **memory)
            masks.clear()
            found.append(hf(input_ids=ids[:, -1:], attention_mask=seen, **memory).logits)
    assert torch.allclose(*found, atol=1e-5)
    assert len(masks) == hf.config.num_hidden_layers
    assert all(mask is masks[0] for mask in masks)
    assert masks[0].dtype == torch.float32
