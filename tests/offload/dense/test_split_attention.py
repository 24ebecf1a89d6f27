"""Attention to rows cut into parts, against plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_local.offload.dense import attention, sink_attention, split_attention
from moe_local.offload.dense.split_attention import attend_in_parts, bias_of, parts_of


def inputs(batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value; these as a slab has them, of which a row's first columns are seen."""
    generator = torch.Generator().manual_seed(batch)
    shapes = (batch, 3, 4, 16), (batch, 3, 100, 16), (batch, 3, 100, 16)
    query, *slab = (2 * torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [query, *(x[:, :, :84] for x in slab)]


def plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    scores = query.double() @ key.double().transpose(-1, -2) * 0.3
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[..., None].expand(len(query), -1, -1, -1)], dim=-1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [1, 2, 7, 84])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("window", [None, 100, 5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_parts_make_the_whole(
    with_sinks: bool, window: int | None, batch: int, parts: int, dtype: torch.dtype
) -> None:
    query, key, value = inputs(batch, dtype)
    seen = None
    if window is not None:  # with most parts behind a row's end or before its window
        ends = torch.tensor([61, 30])[:batch, None, None, None]
        column = torch.arange(84)
        seen = (column < ends) & (column >= ends - window)
    sinks = torch.linspace(-3, 6, 12).view(3, 4) if with_sinks else None
    want = plainly(query, key, value, seen, sinks)
    got = attend_in_parts(query, key, value, seen, 0.3, parts, sinks)
    allowed = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert (got - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("added", [None, "least", "inf"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_parts_that_are_hidden_have_no_share_on_a_gpu(
    with_sinks: bool, added: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's kernel multiplies scores by log2(e). Where all are -inf then, it gives 0 for the logarithm of
    their sum."""
    plain = split_attention.attend

    def as_by_cuda(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output, logsumexp = plain(*args)
        hidden = (args[3].float().amax(-1) / math.log(2)).isneginf()
        return output.masked_fill(hidden[..., None], 0), logsumexp.masked_fill(hidden, 0)

    monkeypatch.setattr(split_attention, "attend", as_by_cuda)
    query, key, value = inputs(1, dtype)
    query, seen = query / 8, (torch.arange(84) < 30)[None, None, None]
    mask = seen
    if added is not None:
        least = torch.finfo(dtype).min if added == "least" else -torch.inf
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, least)
    sinks = torch.linspace(-3, 6, 12).view(3, 4) if with_sinks else None
    want = plainly(query, key, value, seen, sinks)
    got = attend_in_parts(query, key, value, mask, 0.3, 7, sinks)
    assert (got - want).norm() <= 6e-3 * want.norm()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_scores_may_be_large(with_sinks: bool) -> None:
    """Beyond what numbers in fp16, or their exponentials in fp32, can be."""
    query, key, value = inputs(1, torch.float16)
    query, key = 60 * query, 60 * key
    sinks = torch.full((3, 4), 3000.0) if with_sinks else None
    want = plainly(query, key, value, None, sinks)
    got = attend_in_parts(query, key, value, None, 0.3, 7, sinks)
    assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("keys", [96, 84])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_to_scores_is_used_where_it_lies(dtype: torch.dtype, keys: int) -> None:
    """Of the query's type, and if CUDA's kernel can read its rows; else it is copied to where it can."""
    query: Any = SimpleNamespace(shape=(2, 3, 4, 16), dtype=torch.float32, device="cpu", is_cuda=True)
    added = torch.zeros(2, 1, 1, keys, dtype=dtype)
    added[1, ..., 30:] = -torch.inf
    bias = bias_of(added, query, keys)
    assert bias.shape == (2, 3, 4, keys)
    assert bias.dtype == query.dtype
    assert (bias.data_ptr() == added.data_ptr()) == (dtype == query.dtype and keys % 16 == 0)
    assert all(stride % 16 == 0 for stride in bias.stride()[:3])
    assert torch.equal(bias[:, 0, 0] < -1e38, added[:, 0, 0] < 0)


@pytest.mark.parametrize("parts", [1, 2, 6])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, -torch.inf])
def test_a_mask_of_numbers_is_as_one_of_booleans(least: float, batch: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(batch, 3, n, 16, generator=generator) for n in (4, 96))
    seen = torch.arange(96) < torch.tensor([61, 20])[:batch, None, None, None]
    added = torch.zeros(seen.shape).masked_fill(~seen, least)
    want, got = (attend_in_parts(query, key, key, mask, 0.3, parts) for mask in (seen, added))
    assert torch.allclose(got, want, atol=1e-6)


def test_a_mask_for_all_rows_is_one_for_each() -> None:
    query, key, value = inputs(2, torch.float32)
    seen = (torch.arange(84) < 50)[None, None, None]
    for parts in (1, 4):
        got = attend_in_parts(query, key, value, seen, 0.3, parts)
        assert torch.allclose(got.double(), plainly(query, key, value, seen), atol=1e-5)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_who_sees_nothing_gets_numbers(with_sinks: bool, dtype: torch.dtype, parts: int) -> None:
    query, key, value = inputs(2, dtype)
    seen = torch.ones(2, 1, 1, 84, dtype=torch.bool)
    seen[0] = False
    sinks = torch.zeros(3, 4) if with_sinks else None
    got = attend_in_parts(query, key, value, seen, 0.3, parts, sinks)
    assert got.isfinite().all()
    assert torch.allclose(got[1].double(), plainly(query, key, value, None, sinks)[1], atol=2e-2)


def on_gpu(batch: int, heads: int, keys: int) -> list[Any]:
    """Query, key and value as far as `parts_of` looks at them."""
    shapes = (batch, heads, 4, 64), (batch, heads, keys, 64), (batch, heads, keys, 128)
    return [SimpleNamespace(shape=shape, is_cuda=True, device="gpu") for shape in shapes]


def test_each_processor_reads_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_attention, "_processors", lambda device: 128)
    monkeypatch.setattr(split_attention, "_has_kernel", lambda *tensors: True)
    assert parts_of(*on_gpu(1, 8, 8192)) == 16
    assert parts_of(*on_gpu(1, 8, 65536)) == 16
    assert parts_of(*on_gpu(4, 8, 8192)) == 4
    assert parts_of(*on_gpu(1, 4, 6144)) == 24  # not shorter than 256
    assert parts_of(*on_gpu(1, 8, 5000)) == 10  # equal parts
    assert parts_of(*on_gpu(1, 8, 511)) == parts_of(*on_gpu(1, 8, 5003)) == 1
    assert parts_of(*on_gpu(1, 128, 8192)) == parts_of(*on_gpu(32, 8, 8192)) == 1
    query = torch.zeros(1, 2, 4, 16)
    assert parts_of(query, torch.zeros(1, 2, 8192, 16), torch.zeros(1, 2, 8192, 16)) == 1


def test_what_torchs_kernel_does_not_take_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 on an RTX 2080: torch has been asked about these very tensors."""
    asked: list[Any] = []
    tensors = on_gpu(1, 8, 8192)
    monkeypatch.setattr(split_attention, "_processors", lambda device: 128)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *arguments: arguments)
    monkeypatch.setattr(
        torch.backends.cuda, "can_use_efficient_attention", lambda arguments: asked.append(arguments)
    )
    assert parts_of(*tensors) == 1
    assert asked == [(*tensors, None, 0.0, False, False)]


def test_torch_can_be_asked_what_its_kernel_takes() -> None:
    key = torch.zeros(1, 2, 8192, 16)
    assert not split_attention._has_kernel(key[:, :, :4], key, key)  # on no GPU


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_single_queries_are_answered_in_parts(
    masked: bool, with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers is given is the same, however many parts there are."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, h, n, 16, generator=generator) for h, n in ((8, 1), (2, 80), (2, 80)))
    seen = torch.arange(80) < torch.tensor([70, 33])[:, None, None, None] if masked else None
    module: Any = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    sinks = torch.randn(8, generator=generator)

    def attend() -> torch.Tensor:
        if with_sinks:
            return sink_attention.sink_attention(module, query, key, value, seen, scaling=0.3, s_aux=sinks)[0]
        return attention.single_query_attention(module, query, key, value, seen, scaling=0.3)[0]

    want, asked = attend(), []
    plain: Callable[..., Any] = split_attention.attend

    def noted(query: torch.Tensor, *args: Any) -> Any:
        asked.append(query.shape[1])
        return plain(query, *args)

    for place in (attention, sink_attention):
        monkeypatch.setattr(place, "parts_of", lambda *tensors: 5)
    monkeypatch.setattr(split_attention, "attend", noted)
    got = attend()
    assert asked == [5]
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert torch.allclose(got, want, atol=1e-5)
