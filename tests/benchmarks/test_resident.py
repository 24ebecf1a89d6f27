"""resident.py on a device that is RAM: a plain loop says what the library says, and both are timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resident
import torch

import moe_local
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.load import assemble, open_experts
from moe_local.offload.options import LoadOptions
from moe_local.offload.plan.fit import plan_request
from moe_local.offload.plan.footprint import expert_bytes
from moe_local.offload.plan.plan import Request
from support import fake_graphs, torch_kernels


@pytest.fixture
def load(
    make_checkpoint: Callable[..., Path],
    make_device: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int], moe_local.Model]:
    """load(slots): a tiny model on a device with so many slots a layer, which decodes from graphs."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))
    monkeypatch.setenv("MOE_LOCAL_GRAPHS", "on")
    torch_kernels.use(monkeypatch)
    checkpoint = Checkpoint.open(make_checkpoint("mixtral"))

    def load(slots: int) -> moe_local.Model:
        given: dict[str, Any] = {"slots": slots, "context": 64, "experts": "fp32", "dense": "fp32"}
        ram = 8 * sum(expert_bytes(checkpoint.spec, "fp32"))
        request = Request(model=checkpoint.name, spec=checkpoint.spec, ram=ram, vram=2**30, **given)
        device = torch_kernels.in_one_piece(make_device(1))
        file, settings = open_experts(checkpoint, "fp32"), LoadOptions(miss="fetch", **given)
        plan, graphs = plan_request(request).check(), fake_graphs.FakeGraphs()
        return assemble(checkpoint, file, plan, settings, torch.device("cpu"), device, graphs=graphs)

    return load


def test_both_ways_say_the_same(
    load: Callable[[int], moe_local.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "prompt_ids", lambda model, count, start: list(range(3, 3 + count)))
    with load(8) as model:
        plain = resident.Plain(model, fake_graphs.FakeGraphs())
        ours = resident.answer(model, [5, 6, 7], 9)
        assert plain.answer([5, 6, 7], 9)[1] == ours[1]
        routed = sum(model.stats().routed.tokens)
        assert plain.answer([5, 6, 7], 9)[1] == ours[1]
        only_the_prompt = 3 * len(model.plan.request.spec.layers)
        assert sum(model.stats().routed.tokens) - routed == only_the_prompt
        found = resident.measure(model, fake_graphs.FakeGraphs(), prompt_tokens=4, tokens=6, rounds=2)
        assert resident.answer(model, [5, 6, 7], 9)[1] == ours[1]  # and the model is as it was
        model.check_integrity()
    assert (found["ratio"]["rounds"], found["same_ids"]) == (2, True)
    for ms in found["ms_per_token"].values():
        assert 0 < ms["min"] <= ms["median"] <= ms["max"]


def test_other_words_are_told(
    load: Callable[[int], moe_local.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "prompt_ids", lambda model, count, start: [5, 6, 7])
    monkeypatch.setattr(resident, "answer", lambda model, prompt, tokens: (1.0, [0] * tokens))
    with load(8) as model:
        found = resident.measure(model, fake_graphs.FakeGraphs(), prompt_tokens=4, tokens=6, rounds=1)
    assert not found["same_ids"]


def test_experts_that_have_to_move_are_refused(load: Callable[[int], moe_local.Model]) -> None:
    with load(4) as model, pytest.raises(SystemExit, match="the experts are not resident"):
        resident.Plain(model, fake_graphs.FakeGraphs())
