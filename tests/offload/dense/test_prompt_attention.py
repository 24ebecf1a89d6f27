"""Attention of many queries by the library: against torch's, what it takes, and in loaded models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import moe_local
from moe_local.offload.dense import attention, sink_attention
from moe_local.offload.dense.attention import single_query_attention
from moe_local.offload.dense.prompt_attention import FEWEST_ROWS, prompt_attention
from moe_local.offload.native.library import ISAS, library
from support import attention_checks, tiny_models

pytestmark = pytest.mark.skipif(
    (lib := library()) is None or lib.moe_isa() == ISAS.index("portable"),
    reason="torch's kernel is the faster one here",
)


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[torch.Tensor]:
    """query [B, 8, T, 32], key [B, 2, S, 32] and value [B, 2, S, 16]."""
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(batch, 8, queries, 32), (batch, 2, keys, 32), (batch, 2, keys, 16)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def causal(queries: int, keys: int, window: int | None = None) -> torch.Tensor:
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    return seen if window is None else seen & torch.ones_like(seen).triu(keys - queries - window + 1)


def torchs(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> torch.Tensor:
    answer = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True, **options)
    return answer.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys", "window"), [(9, 9, None), (150, 400, None), (150, 400, 30)])
def test_equals_torchs(queries: int, keys: int, window: int | None, dtype: torch.dtype) -> None:
    given, mask = inputs(queries, keys, dtype), causal(queries, keys, window)
    got = prompt_attention(*given, mask, 0.3)
    assert got is not None
    assert got.is_contiguous()
    assert got.dtype is dtype
    want = torchs(*(x.double() for x in given), mask, scale=0.3)
    assert (got - want).norm() <= (1e-6 if dtype is torch.float32 else 6e-3) * want.norm()


def test_without_a_mask() -> None:
    """Each sees those before it, or all; the scale is the usual one."""
    given = inputs(20, 20)
    for is_causal in (True, False):
        got = prompt_attention(*given, None, causal=is_causal)
        assert got is not None
        assert torch.allclose(got, torchs(*given, None, is_causal=is_causal), atol=1e-6)


def test_strides_of_any_kind() -> None:
    """Heads behind tokens, a part of a longer cache, and numbers that do not lie together."""
    query, key, value = inputs(20, 30)
    want = prompt_attention(query, key, value, causal(20, 30))
    others = [
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([key, key], dim=2)[:, :, :30],
        value.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    got = prompt_attention(*others, causal(20, 30))
    assert got is not None
    assert want is not None
    assert torch.equal(got, want)


def test_masks_of_each_row_and_of_all() -> None:
    given, mask = inputs(20, 30), causal(20, 30).repeat(2, 1, 1, 1)
    mask[1, :, :, :7] = False
    got = prompt_attention(*given, mask)
    assert got is not None
    assert torch.allclose(got, torchs(*given, mask), atol=1e-6)
    one, both = prompt_attention(*given, causal(20, 30)), prompt_attention(*given, mask | causal(20, 30))
    assert one is not None
    assert both is not None
    assert torch.equal(one, both)
    expanded = prompt_attention(*given, causal(20, 30).expand(2, 1, 20, 30))
    assert expanded is not None
    assert torch.equal(one, expanded)
    assert torch.equal(got[0], one[0])


def test_what_it_leaves_to_torch() -> None:
    query, key, value = inputs(20, 20)
    mask = causal(20, 20)
    assert prompt_attention(query, key, value, mask) is not None
    scattered = mask.clone()
    scattered[..., 9, 4] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for other in (scattered, added, mask.expand(2, 8, 20, 20), mask[:, :, :1], mask[0]):
        assert prompt_attention(query, key, value, other) is None
    few = FEWEST_ROWS // 4 - 1
    narrow = (query[..., :24], key[..., :24], value)
    for given in (
        (query[:, :, :few], key[:, :, :few], value[:, :, :few]),
        (query[:, :, :1], key, value),
        (query.double(), key.double(), value.double()),
        (query, key.bfloat16(), value.bfloat16()),
        (query.to("meta"), key.to("meta"), value.to("meta")),
        (query.clone().requires_grad_(), key, value),
        narrow,
        (query, key, value[..., :8]),
        (query, key, value[:, :, :9]),
        (query[:, :7], key, value),
        (query[:1], key, value),
        (query, key[:, :, :0], value[:, :, :0]),
    ):
        assert prompt_attention(*given, None) is None
    for scaling in (0.0, -1.0, float("nan")):
        assert prompt_attention(query, key, value, mask, scaling) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert prompt_attention(query, key, value, mask) is None


def test_the_attention_of_models_goes_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where options ask for what it does not do."""
    taken: list[bool] = []

    def noted(*args: Any, **options: Any) -> Any:
        answer = prompt_attention(*args, **options)
        taken.append(answer is not None)
        return answer

    monkeypatch.setattr(attention, "prompt_attention", noted)
    query, key, _ = inputs(20, 20)
    given, mask = (query, key, key), causal(20, 20)
    module: Any = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    for behind in (None, mask):
        want, _ = sdpa_attention_forward(module, *given, behind, scaling=0.3)
        got, _ = single_query_attention(module, *given, behind, scaling=0.3)
        assert torch.allclose(got, want, atol=1e-6)
    for is_causal in (True, False):
        for name in ("module", "option"):
            module.is_causal = is_causal if name == "module" else not is_causal
            options = {} if name == "module" else {"is_causal": is_causal}
            want, _ = sdpa_attention_forward(module, *given, None, **options)
            got, _ = single_query_attention(module, *given, None, **options)
            assert torch.allclose(got, want, atol=1e-6)
    assert taken == [True] * 6
    single_query_attention(module, *given, mask, dropout=0.5)
    assert len(taken) == 6


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_a_loaded_model_answers_as_transformers_own(
    make_checkpoint: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of a prompt and rows of a batch of several lengths."""
    taken: list[bool] = []

    def noted(*args: Any, **options: Any) -> Any:
        answer = prompt_attention(*args, **options)
        taken.append(answer is not None)
        return answer

    for module in (attention, sink_attention):
        monkeypatch.setattr(module, "prompt_attention", noted)
    plain = tiny_models.tiny_model(family)
    with moe_local.load(
        make_checkpoint(family), device="cpu", experts="fp32", context=128, parallel=2
    ) as model:
        attention_checks.check_ids(model, plain)
    assert any(taken)
