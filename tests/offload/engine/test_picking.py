"""Picking tokens from logits: on a device, with one wait for all sequences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.engine import picking
from moe_local.offload.engine.sequence import Sequence, SequenceError


def greedy() -> Sequence:
    settings: Any = SimpleNamespace(logprobs=None, processors=[], do_sample=False)
    return Sequence([1, 2], 2, settings, 0)


def unseen(sequence: Sequence) -> Any:
    raise AssertionError("only processors need the ids")


def test_the_device_is_asked_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have no numbers to wait for, so that anything that reads one raises."""
    stacked: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda picked: stacked.append(picked.shape) or [[7, 0], [8, 0]]
    )
    rows = [(greedy(), torch.empty(1, 50, device="meta")) for _ in range(2)]
    assert [pick.token for pick in picking.pick_tokens(rows, unseen)] == [7, 8]
    assert stacked == [(2, 2)]


@pytest.mark.parametrize("do_sample", [True, False])
def test_scores_that_are_not_finite(do_sample: bool) -> None:
    """Those that overflowed are the likeliest; where none is left, that is an error and not a token."""
    inf, logits = torch.inf, torch.tensor([[0.5, 3.0, -1.0, 3.0]])
    sequence = greedy()
    sequence.settings.do_sample, sequence.settings.generator = do_sample, torch.Generator().manual_seed(1)
    cases = {
        (-inf, 1.0, inf, -inf): 2,
        (-inf, -inf, -inf, -3e38): 3,
        (-inf, -inf, -inf, -inf): None,
        (0.0, torch.nan, inf, 0.0): None,
    }
    for scores, expected in cases.items():
        sequence.settings.processors = lambda ids, logits, scores=scores: torch.tensor([scores])
        for _ in range(5):
            if expected is not None:
                assert picking.pick_tokens([(sequence, logits)], lambda _: logits)[0].token == expected
                continue
            with pytest.raises(SequenceError, match="leave no token to choose at position 2"):
                picking.pick_tokens([(sequence, logits)], lambda _: logits)
    with pytest.raises(MoeLocalError, match="the model computed NaN at position 1"):
        picking.pick_tokens([(sequence, logits * torch.nan)], lambda _: logits)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_largest_and_its_score(on_cpu: bool) -> None:
    scores = torch.tensor([0.5, 3.0, -1.0, 3.0])
    for nan in (None, 0, 2):
        if nan is not None:
            scores = scores.clone().index_fill_(0, torch.tensor(nan), float("nan"))
        given = scores if on_cpu else scores.as_subclass(Elsewhere)
        token, score = picking._largest(given)
        assert int(token) == (1 if nan is None else 0)
        assert bool(score.isnan()) == (nan is not None)


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on a device."""

    is_cpu = False
