"""Misses that a CUDA device looks up and brings by itself, from RAM that is really pinned."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_local
from moe_local.offload.engine.miss_trial import VARIABLE
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.gpu.device_misses import DeviceMisses
from moe_local.offload.kernels.fetch import LayerTables, fetch_kernels
from moe_local.offload.kernels.launcher import UNIT
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.mapped import is_mapped
from support import torch_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton")
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", "on")
    yield
    torch.cuda.empty_cache()


def load(
    folder: Path, mode: str, slots: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> moe_local.Model:
    monkeypatch.setenv(VARIABLE, mode)
    given = {"miss": "fetch", "prefetch": "off", "experts": "nf4", "context": 512} | options
    return moe_local.load(folder, device="cuda", slots=slots, **given)


def narrow(make_checkpoint: Callable[..., Path], model_type: str) -> Path:
    """With rows of whole blocks."""
    return make_checkpoint(model_type, **({} if model_type == "qwen3_moe" else {"intermediate_size": 128}))


def answers(model: moe_local.Model) -> list[list[int]]:
    rng, found = random.Random(0), []
    for length in (5, 40, 12):
        prompt = [rng.randrange(3, 320) for _ in range(length)]
        found.append(model.generate(prompt, max_new_tokens=60, eos_token_id=None).token_ids)
        model.check_integrity()
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_ids_as_with_the_host_and_all_resident(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    folder = narrow(make_checkpoint, model_type)
    with load(folder, "off", 8, monkeypatch) as model:
        want = answers(model)
    with load(folder, "off", 4, monkeypatch) as model:
        assert answers(model) == want
        by_host = model.stats()
    with load(folder, "on", 4, monkeypatch) as model:
        assert isinstance(model.parts.store.custody, DeviceMisses)
        assert answers(model) == want
        step, stats = model.parts.engine.token_step, model.stats()
        assert step is not None
        assert {captured.segments for captured in step.captured.values()} == {1}
    assert stats.routed == by_host.routed
    assert stats.misses == pytest.approx(by_host.misses, rel=0.2)  # whose lists know all but the last token
    assert stats.stall.demand > 0


def test_a_token_waits_for_nothing_but_its_id_and_its_log(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(narrow(make_checkpoint, "qwen3_moe"), "on", 4, monkeypatch) as model:
        engine, ids = model.parts.engine, list(range(3, 40))
        settings = make_settings(model.hf, ids, max_new_tokens=99, eos_token_id=None, do_sample=False)
        sequence = engine.join(ids, settings)
        for _ in range(8):
            engine.step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in caught if "sync" in str(warning.message)]
        assert len(waits) <= 2, waits
        engine.leave(sequence)


def test_experts_are_brought_from_ranges_that_were_pinned_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, tables, and times of the GPU's clock that fit the bytes."""
    monkeypatch.setattr("moe_local.offload.tiers.arena.PIN_BYTES", 1 << 20)
    nbytes, experts, slots, top_k = 1 << 18, 32, 12, 4
    host = HostArena([experts], [nbytes], pin=True)
    assert len(host.memory.registered) > 4
    assert is_mapped(host.memory)
    host.memory.tensor.copy_(torch.randint(256, host.memory.tensor.shape, dtype=torch.uint8))
    arena = torch.zeros(slots, nbytes, dtype=torch.uint8, device="cuda")
    numbers = [
        torch.full((experts,), -1),
        torch.full((slots,), -1),
        torch.zeros(slots, dtype=torch.int64),
        torch.arange(slots) * (nbytes // UNIT),
        torch.tensor([host.offset(0, expert) for expert in range(experts)]),
        torch.tensor([0, *range(slots)]),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(4 + 2 * top_k, dtype=torch.int64),
    ]
    want, got = LayerTables(*numbers), LayerTables(*(each.cuda() for each in numbers))
    oracle, fetch = torch_kernels.TorchFetch(), fetch_kernels(arena.device)
    assert fetch is not None
    rng = random.Random(0)
    for _ in range(40):
        ids = torch.tensor(rng.sample(range(experts), top_k))
        found = fetch.look_up(got, ids.cuda(), begins=True)
        assert torch.equal(found.cpu(), oracle.look_up(want, ids, begins=True))
        fetch.bring(got, host.memory.tensor, arena[0], nbytes)
        for one, other in zip(got[:-1], want[:-1], strict=True):
            assert torch.equal(one.cpu(), other)
        log = got.log.cpu()
        assert torch.equal(log[4:], want.log[4:])
        brought = int((log[4 + top_k :] >= 0).sum())
        assert 0 <= int(log[2] - log[1]) < 10**9
        if brought:
            assert brought * nbytes / max(1, int(log[2] - log[1])) < 500  # bytes a nanosecond
        for expert in ids.tolist():
            slot = int(want.slot_of[expert])
            assert torch.equal(arena[slot].cpu(), host.buffer(0, expert))
    host.close()
