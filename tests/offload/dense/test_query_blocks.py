"""Attention of many queries in blocks: which keys each is given, and that the numbers stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moe_local.offload.dense import query_blocks as blocks
from moe_local.offload.dense.attention import single_query_attention
from moe_local.offload.dense.query_blocks import BLOCK, query_blocks
from moe_local.offload.dense.sink_attention import sink_attention

pytestmark = pytest.mark.usefixtures("torch_attends")

ALL = [(slice(None), slice(None))]


def causal(queries: int, keys: int, window: int | None = None) -> torch.Tensor:
    """[1, 1, T, S]: the last T of S positions, which see those before them, or a window of these."""
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    return seen if window is None else seen & torch.ones_like(seen).triu(keys - queries - window + 1)


def inputs(queries: int, keys: int, dtype: torch.dtype, batch: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(batch, 4, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 16)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.fixture(params=["sdpa", "sinks"])
def attend(request: pytest.FixtureRequest) -> Any:
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    if request.param == "sdpa":
        return lambda *given: single_query_attention(module, *given, scaling=0.3)[0]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    return lambda *given: sink_attention(module, *given, scaling=0.3, s_aux=sinks)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(1100, 1100, 700), (600, 1300, None), (40, 1300, 50)]
)
def test_equals_one_block_of_all(
    attend: Any,
    queries: int,
    keys: int,
    window: int | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = (*inputs(queries, keys, dtype), causal(queries, keys, window))
    got = attend(*given)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 20)
    assert torch.allclose(attend(*given), got, atol=1e-6 if dtype == torch.float32 else 4e-3)


def test_equals_transformers_sdpa() -> None:
    query, key, value = inputs(900, 1300, torch.float32)
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    mask = causal(900, 1300, 300)
    got, _ = single_query_attention(module, query, key, value, mask)
    want, _ = sdpa_attention_forward(module, query, key, value, mask)
    assert torch.allclose(got, want, atol=1e-6)


def test_rows_of_a_batch_that_begin_later(attend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row's first 800 positions are padding, which sees nothing."""
    given = inputs(1100, 1100, torch.float32, batch=2)
    mask = causal(1100, 1100).repeat(2, 1, 1, 1)
    mask[1, :, :, :800] = False
    got = attend(*given, mask)
    assert got.isfinite().all()
    monkeypatch.setattr(blocks, "BLOCK", 1 << 20)
    want = attend(*given, mask)
    assert torch.allclose(got[0], want[0], atol=1e-6)
    assert torch.allclose(got[1, 800:], want[1, 800:], atol=1e-6)


def test_each_block_is_given_what_it_sees() -> None:
    query, key, _ = inputs(1300, 2000, torch.float32)
    assert BLOCK == 512
    assert query_blocks(query, key, causal(1300, 2000)) == [
        (slice(0, 512), slice(0, 1212)),
        (slice(512, 1024), slice(0, 1724)),
        (slice(1024, 1536), slice(0, 2000)),
    ]
    assert query_blocks(query, key, causal(1300, 2000, 100)) == [
        (slice(0, 512), slice(512, 1212)),  # 601 is the first one seen
        (slice(512, 1024), slice(1024, 1724)),
        (slice(1024, 1536), slice(1536, 2000)),
    ]


def test_masks_that_tell_nothing_make_no_blocks() -> None:
    query, key, _ = inputs(1300, 1300, torch.float32)
    assert query_blocks(query, key, None) == ALL
    assert query_blocks(query, key, torch.zeros(1, 1, 1300, 1300)) == ALL
    assert query_blocks(query, key, torch.ones(1, 1, 1, 1300, dtype=torch.bool)) == ALL
    padding = torch.zeros(1, 1, 1300, 1300, dtype=torch.bool)
    assert [seen for _, seen in query_blocks(query, key, padding)] == [slice(1300)] * 3
