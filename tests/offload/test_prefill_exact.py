"""Prompts through the ring against the old way through the layers' own slots: the same bits, fewer stalls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.placement import place
from moe_local.offload.plan.plan import Request
from support import fake_device
from support.variants import others_slow

torch.set_num_threads(1)
CPU = torch.device("cpu")
CHUNK = 48


def load(
    folder: Path, *, staging: int | None, slots: int, devices: Sequence[Any] = (), miss: str = "fetch"
) -> moe_local.Model:
    """With so many staging slots in each tier that is no whole; None: as planned. With devices RAM has 4."""
    checkpoint = Checkpoint.open(folder)
    options = LoadOptions(slots=slots, context=256, experts="fp32", dense="fp32", miss=miss)
    on_card: dict[str, Any] = {"vram": len(devices) * 2**30} if devices else {}
    if len(devices) > 1:
        on_card["cards"] = (2**30,) * len(devices)
    request = Request(
        "tiny",
        checkpoint.spec,
        ram=2**30,
        experts="fp32",
        dense="fp32",
        context=256,
        slots=slots,
        **on_card,
    )
    plan = dataclasses.replace(place(request).check(), chunk=CHUNK)
    if devices:
        plan = dataclasses.replace(plan, ram_slots=(4,) * len(plan.ram_slots), mode="disk", ram_staging=4)
    if staging is not None:
        plan = dataclasses.replace(plan, vram_staging=staging, ram_staging=staging)
    targets = [CPU] * max(1, len(devices))
    return assemble(checkpoint, open_experts(checkpoint, "fp32"), plan, options, targets, devices)


def answers(model: moe_local.Model) -> list[torch.Tensor]:
    """Logits and greedy ids of prompts of several lengths, one of them of rows, with decoding between."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for rows, length in ((1, 5), (1, 150), (3, 60), (1, CHUNK)):
        ids = torch.randint(3, 320, (rows, length), generator=generator)
        with torch.inference_mode():
            found.append(model.hf(ids).logits)
        found.append(model.generate(ids, max_new_tokens=4, eos_token_id=None))
        model.check_integrity()
    return found


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cards", others_slow([0, 1, 2], [2]))
def test_the_ring_changes_no_bit(make_checkpoint: Callable[..., Path], family: str, cards: int) -> None:
    folder = make_checkpoint(family, tokenizer=True)

    def run(staging: int | None, slots: int) -> list[torch.Tensor]:
        devices = [fake_device.FakeDevice(seed=slots + card, luck=0.3) for card in range(cards)]
        with load(folder, staging=staging, slots=slots, devices=devices) as model:
            prefill = model._parts.store.prefill
            assert (prefill is None) == (staging == 0)
            assert prefill is None or prefill.chunk == CHUNK
            found = answers(model)
            counts = model.stats()
        assert counts.misses > 0
        assert all(device.copies > 0 and device.faults == [] for device in devices)
        return found

    expected = run(0, 2)
    for staging, slots in ((None, 2), (3, 5)):
        for one, other in zip(run(staging, slots), expected, strict=True):
            assert torch.equal(one, other)


def test_a_prompt_keeps_what_decoding_uses_and_reads_each_absent_expert_once(tiny_mixtral: Path) -> None:
    with load(tiny_mixtral, staging=None, slots=3) as model:
        prompt = torch.randint(3, 320, (1, CHUNK - 1), generator=torch.Generator().manual_seed(0))
        model.generate(prompt, max_new_tokens=4, eos_token_id=None)
        before = model.stats()
        model.hf(prompt)
        counts = model.stats() - before
        size = model.plan.bytes.expert
        layers = len(model.plan.ram_slots)
        assert counts.hits + counts.misses == layers * 8
        assert counts.bytes.disk == layers * 5 * size + counts.prefetch.wasted_bytes
        assert counts.evictions <= layers * 3


def test_chunks_that_a_lack_of_memory_made_shorter_read_ahead_for_the_next_one(tiny_mixtral: Path) -> None:
    """After the last layer, for the first."""
    with load(tiny_mixtral, staging=None, slots=3) as model:
        engine, staged = model.parts.engine, model.parts.store.tier.cache.staging
        ahead = []
        for engine.chunk in (CHUNK, CHUNK // 2):
            prompt = torch.randint(3, 320, (CHUNK + 10,), generator=torch.Generator().manual_seed(0)).tolist()
            sequence = engine.join(prompt, make_settings(engine.hf, prompt, max_new_tokens=1))
            assert engine.step() == []
            ahead.append([layer for layer in range(3) if any(staged.has(layer, e) for e in range(8))])
            engine.leave(sequence)
            engine.forget()
        assert ahead == [[0], [0]]


def test_every_expert_resident_needs_no_ring(tiny_mixtral: Path) -> None:
    with moe_local.load(tiny_mixtral, experts="fp32", context=64) as model:
        assert model.plan.mode == "resident"
        assert model._parts.store.prefill is None
        assert model.plan.to_dict()["staging"] == {"vram": 0, "ram": 0}


def test_ctrl_c_in_mid_prompt_leaves_the_model_usable(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_local.offload.store import prefill

    looks = iter(range(10_000))
    stop = 7

    def look() -> None:
        if next(looks) == stop:
            raise KeyboardInterrupt

    with load(tiny_mixtral, staging=2, slots=2) as model:
        prompt = torch.randint(3, 320, (1, 100), generator=torch.Generator().manual_seed(0))
        expected = model.generate(prompt, max_new_tokens=3, eos_token_id=None)
        monkeypatch.setattr(prefill, "check_interrupt", look)
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt, max_new_tokens=3, eos_token_id=None)
        model.check_integrity()
        assert torch.equal(model.generate(prompt, max_new_tokens=3, eos_token_id=None), expected)
        model.check_integrity()
