"""Training: the fast experts equal transformers', a stopped run goes on, and the loss falls."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_local.demo import gate
from moe_local.demo import train as training
from moe_local.demo.network import RouterLosses, build_model, grouped_experts
from moe_local.demo.routing import lru_hits
from moe_local.demo.train import Options, train


def test_grouped_experts_equal_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(0)
    ids = torch.randint(6, 2048, (3, 17), generator=torch.Generator().manual_seed(1))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        gradient = model.model.layers[2].mlp.experts.gate_up_proj.grad
        assert gradient is not None
        return logits.detach(), gradient.clone()

    expected = run()
    monkeypatch.setattr(MixtralExperts, "forward", grouped_experts)
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_router_losses_are_least_when_the_load_is_even() -> None:
    losses = RouterLosses(build_model(0))
    scores = torch.zeros(4, 8)
    even, uneven = torch.arange(8).reshape(4, 2), torch.tensor([[0, 1]] * 4)
    sharp = scores.clone()
    sharp[:, :2] = 4.0
    real = torch.ones(4)
    losses._seen = [(scores, even)]
    assert losses.take(real)[0].item() == pytest.approx(1.0)
    losses._seen = [(sharp, uneven)]
    assert losses.take(real)[0].item() > 3


def test_padding_does_not_count_in_router_losses() -> None:
    losses = RouterLosses(build_model(0))
    scores, chosen = torch.randn(6, 8), torch.arange(12).reshape(6, 2) % 8
    losses._seen = [(scores, chosen)]
    padded = losses.take(torch.tensor([1.0, 1, 1, 1, 0, 0]))
    losses._seen = [(scores[:4], chosen[:4])]
    for one, other in zip(padded, losses.take(torch.ones(4)), strict=True):
        torch.testing.assert_close(one, other)


def test_lru_hits_of_a_sequence_worked_by_hand() -> None:
    steps = [[0, 1], [1, 2], [0, 3], [3, 1]]
    assert lru_hits(steps, 2) == 2  # 1 in step two, 3 in step four
    assert lru_hits(steps, 8) == 4


def test_gate_tables_do_not_repeat_a_question() -> None:
    rows = gate.conversations(gate.OPEN) + gate.conversations(gate.BLIND)
    keys = [" / ".join(map(gate.normalize, turns)) for turns, _ in rows]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_minute_of_training_lowers_the_loss_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which every step takes a second, on any machine."""
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    options = {"tokens": 100_000, "batch_tokens": 1024}
    half = train(Options(tmp_path / "run", minutes=0.4, **options))
    whole = train(Options(tmp_path / "run", resume=True, **options))
    assert half.step == 25
    assert half.tokens < 100_000 <= whole.tokens
    assert whole.opening < min(half.opening, 5.0)  # nats; log(2048) = 7.6 before the first step
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]
