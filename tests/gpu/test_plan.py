"""What a model takes of a card against its plan, by what torch's allocator counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_local
from moe_local.cache.ladder import arena_bytes
from moe_local.offload.plan.footprint import cuda_overhead
from moe_local.offload.plan.plan import largest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILIES = [
    *("mixtral", "qwen3_moe", "gpt_oss", "gemma4", "llama4", "deepseek_v3"),
    *("deepseek_v32", "glm_moe_dsa"),  # an indexer
    *("qwen3_next", "lfm2_moe", "jamba", "granitemoehybrid"),  # states
]
PROMPT, CONTEXT = 2700, 4096
SLACK = 96 << 20
"""Workspaces of cuBLAS, tables of kernels, and pieces, whose length is chosen for larger models: part of what
is planned for CUDA itself."""


@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_is_taken_than_was_planned(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str
) -> None:
    """A prompt of two chunks: its scans, scores and masks are the largest of all that tiny models make."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    folder = make_checkpoint(family)
    options = {"experts": "nf4", "dense": "bf16", "context": CONTEXT, "slots": 2, "prefetch": "off"}
    torch.cuda.synchronize()
    empty = torch.cuda.memory_allocated()
    with moe_local.load(folder, device="cuda", **options) as model:
        plan, ladders = model.plan, model.plan.request.ladders
        slots = arena_bytes(plan.vram_slots, ladders) + plan.vram_staging * largest(ladders)
        assert torch.cuda.memory_allocated() - empty <= plan.bytes.dense + plan.bytes.kv + slots + SLACK
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        prompt = [5 + place % 300 for place in range(PROMPT)]
        answer = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert len(answer.token_ids) == 4
        taken = torch.cuda.max_memory_allocated() - before
        planned = plan.bytes.workspace - cuda_overhead(plan.request.vram or 0)
        assert taken <= planned + SLACK
