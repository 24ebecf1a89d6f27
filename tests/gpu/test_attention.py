"""Attention on a CUDA device: right, and without the scores of all heads in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_local
from moe_local.offload.dense import latent_attention
from moe_local.offload.dense.attention import leave_cudnn_out, single_query_attention
from moe_local.offload.dense.sink_attention import sink_attention
from moe_local.offload.dense.split_attention import parts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS, GROUPS, WIDTH = 16, 4, 64
MODULE: Any = SimpleNamespace(num_key_value_groups=GROUPS, is_causal=True)


@pytest.fixture(autouse=True)
def without_cudnn() -> Iterator[None]:
    """As in a process that has loaded a model."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    leave_cudnn_out()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def inputs(queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value, sinks and a causal mask."""
    generator = torch.Generator().manual_seed(keys)
    shapes = [(1, HEADS, queries, WIDTH), *[(1, HEADS // GROUPS, keys, WIDTH)] * 2, (HEADS,)]
    drawn = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
    return [*drawn, torch.ones(1, 1, queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)]


def plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    seen: torch.Tensor,
) -> torch.Tensor:
    key, value = (x.double().repeat_interleave(GROUPS, dim=1) for x in (key, value))
    scores = (query.double() @ key.transpose(-1, -2) * 0.125).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    shares = scores.softmax(dim=-1)[..., : key.shape[2]]
    return (shares @ value).transpose(1, 2)


def test_a_loaded_model_keeps_cudnn_out() -> None:
    """Which makes a plan for every new shape, and which torch prefers on an H100 and its successors."""
    cudnn = torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value
    calls = []
    for queries, keys in ((1, 77), (77, 77), (1, 256)):
        query, key, value, _, seen = inputs(queries, keys, torch.bfloat16)
        calls.append((query, key, value, None if keys == 77 else seen, queries > 1))
    torch.backends.cuda.enable_cudnn_sdp(True)
    with moe_local.load("demo", device="cuda"):
        for query, key, value, mask, causal in calls:
            chosen = torch._fused_sdp_choice(query, key, value, mask, 0.0, causal, enable_gqa=True)
            assert chosen != cudnn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "masked"),
    [
        (1, 77, False),
        (1, 77, True),
        (1, 4096, False),
        (1, 4096, True),
        (77, 77, False),
        (77, 77, True),
        (100, 1001, True),
    ],
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_agrees_with_plain_numbers(
    queries: int, keys: int, masked: bool, with_sinks: bool, dtype: torch.dtype
) -> None:
    query, key, value, sinks, seen = inputs(queries, keys, dtype)
    mask = seen if masked else None
    if with_sinks:
        got, _ = sink_attention(MODULE, query, key, value, mask, scaling=0.125, s_aux=sinks)
    else:
        got, _ = single_query_attention(MODULE, query, key, value, mask, scaling=0.125)
    want = plainly(query, key, value, sinks if with_sinks else None, seen)
    assert got.shape == want.shape
    assert got.dtype == dtype
    allowed = 1e-3 if dtype == torch.float32 else 1e-2  # fp32 may be multiplied as TF32
    assert (got - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [(0, 700), (3000, 3128), (0, 4096)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("added", [None, "least", "inf"])
def test_a_long_row_is_read_in_parts(
    added: str | None, with_sinks: bool, columns: tuple[int, int], dtype: torch.dtype
) -> None:
    """Of a row in a slab, with parts that are all hidden behind its end or before its window."""
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("torch has no kernel for bf16 here")
    query, key, value, sinks, seen = inputs(1, 5120, dtype)
    key, value = key[:, :, :4096], value[:, :, :4096]
    column = torch.arange(4096, device="cuda")
    seen = ((column >= columns[0]) & (column < columns[1])).view(1, 1, 1, -1)
    mask = seen
    if added is not None:
        least = torch.finfo(dtype).min if added == "least" else -torch.inf
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, least)
    packed = query.view(1, HEADS // GROUPS, GROUPS, WIDTH)
    assert parts_of(packed, key, value) > 1
    if with_sinks:
        got, _ = sink_attention(MODULE, query, key, value, mask, scaling=0.125, s_aux=sinks)
    else:
        got, _ = single_query_attention(MODULE, query, key, value, mask, scaling=0.125)
    want = plainly(query, key, value, sinks if with_sinks else None, seen)
    allowed = 1e-3 if dtype == torch.float32 else 1e-2
    assert (got - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_prompt_keeps_no_scores(with_sinks: bool, dtype: torch.dtype) -> None:
    query, key, value, sinks, _ = inputs(1024, 1024, dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if with_sinks:
        sink_attention(MODULE, query, key, value, None, scaling=0.125, s_aux=sinks)
    else:
        single_query_attention(MODULE, query, key, value, None, scaling=0.125)
    tensor = query.numel() * max(4, query.element_size())
    scores = HEADS * 1024 * 1024 * query.element_size()
    assert torch.cuda.max_memory_allocated() - before <= 6 * tensor < scores


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_masked_query_copies_no_keys(with_sinks: bool) -> None:
    query, key, value, sinks, seen = inputs(1, 8192, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if with_sinks:
        sink_attention(MODULE, query, key, value, seen, scaling=0.125, s_aux=sinks)
    else:
        single_query_attention(MODULE, query, key, value, seen, scaling=0.125)
    assert torch.cuda.max_memory_allocated() - before < key.numel() * key.element_size() / 4


@pytest.mark.parametrize("dense", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_latents_are_not_expanded_for_single_tokens(
    make_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    family: str,
    dense: str,
) -> None:
    """Loading has compared the logits; here are the ids, from graphs, with those of the CPU."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", "on")
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, found = make_checkpoint(family), []
    for device in ("cpu", "cuda"):
        with moe_local.load(
            folder, device=device, experts="fp32", dense=dense, miss="fetch", slots=4
        ) as model:
            assert model.hf.config._attn_implementation == latent_attention.NAME
            assert latent_attention._is_known(model.hf.model.layers[0].self_attn.kv_b_proj)
            out = model.generate(list(range(3, 40)), max_new_tokens=24, do_sample=False, eos_token_id=None)
            found.append(out.token_ids)
            model.check_integrity()
            if device == "cuda":
                step = model._open().engine.token_step
                assert step is not None
                assert step.captured
    assert dense != "fp32" or found[0] == found[1]
