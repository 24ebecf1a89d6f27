"""Penalties and biases of single tokens, held against their formula."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from moe_local.cache.errors import OptionError
from moe_local.offload.engine.penalties import Penalties
from moe_local.offload.engine.sampling import make_settings, needs_hf_generate, without_shaping


def no_room(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_formula_and_only_the_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, prompt = 20, [3, 3, 3, 4]
    penalties = Penalties(len(prompt), frequency=0.5, presence=0.25, bias={7: -100.0, 4: 2.0})
    generator = torch.Generator().manual_seed(0)
    answer: list[int] = []
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        ids = torch.tensor([prompt])
        patched.setattr(torch, "tensor", no_room)
        penalties(ids, torch.zeros(1, vocabulary))
    for token in (5, 5, 3, 7, 5):
        scores = torch.randn(1, vocabulary, generator=generator)
        before = scores.clone()
        ids = torch.tensor([prompt + answer])
        found = penalties(ids, scores)
        assert torch.equal(penalties(ids, scores), found), "a step that is made again counts nothing twice"
        assert torch.equal(scores, before)
        counts = Counter(answer)
        for t in range(vocabulary):
            wanted = before[0, t] - 0.5 * counts[t] - 0.25 * (counts[t] > 0) + {7: -100.0, 4: 2.0}.get(t, 0.0)
            assert found[0, t] == pytest.approx(float(wanted), abs=1e-5)
        answer.append(token)


def test_nothing_is_done_where_nothing_is_asked(mixtral: Any) -> None:
    for asked in (
        {},
        {"frequency_penalty": 0, "presence_penalty": 0.0},
        {"logit_bias": {}},
        {"logit_bias": None},
    ):
        assert not make_settings(mixtral, [5], **asked).processors


def test_they_come_before_what_chooses_among_the_likely(mixtral: Any) -> None:
    settings = make_settings(mixtral, [5], do_sample=True, top_k=1, logit_bias={9: 100})
    scores = settings.processors(torch.tensor([[5]]), torch.zeros(1, mixtral.config.vocab_size))
    assert scores[0].isfinite().nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency_penalty": 2.5}, r"^frequency_penalty is 2.5; it must be a number, from -2 to 2$"),
        ({"presence_penalty": "1"}, "^presence_penalty is '1'"),
        ({"logit_bias": [1]}, "^logit_bias is of type list; it must map token ids"),
        ({"logit_bias": {"x": 1}}, "^logit_bias has 'x'; it must be token ids, from 0 to"),
        ({"logit_bias": {-1: 1}}, "^logit_bias has -1; "),
        ({"logit_bias": {10**6: 1}}, "^logit_bias has 1000000; "),
        ({"logit_bias": {5: 101}}, "^logit_bias of token 5 is 101; it must be a number from -100 to 100$"),
        ({"logit_bias": {5: float("nan")}}, "^logit_bias of token 5 is nan"),
        ({"logit_bias": {5: True}}, "^logit_bias of token 5 is True"),
    ],
)
def test_what_is_refused(mixtral: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_settings(mixtral, [5], **options)


def test_transformers_own_generate_is_not_asked_for_them(mixtral: Any) -> None:
    asked = {"num_beams": 2, "logit_bias": {5: 1}, "presence_penalty": None}
    assert needs_hf_generate(mixtral, asked)
    with pytest.raises(OptionError, match=r"^logit_bias cannot be combined with beams"):
        without_shaping(asked)
    assert without_shaping({"num_beams": 2, "presence_penalty": None}) == {"num_beams": 2}
