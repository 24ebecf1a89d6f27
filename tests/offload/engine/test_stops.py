"""Answers end with the same token as by transformers' tables over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.stopping_criteria import StopStringCriteria

from moe_local.cache.errors import OptionError
from moe_local.offload.engine.sampling import make_settings
from moe_local.offload.engine.stops import AnswerStops
from support import tiny_models
from support.small_tokenizers import sentencepiece_like

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "byte-level":
        return tiny_models.tiny_tokenizer()
    return sentencepiece_like(request.param == "metaspace")


def end(tokenizer: Any, answer: list[int], stops: list[str]) -> int | None:
    """How many tokens the answer has when a stop string ends it; None: none does."""
    found = AnswerStops(tokenizer, stops)
    for at, token in enumerate(answer):
        if found.completed(PROMPT + answer[:at], len(PROMPT), token):
            return at + 1
    return None


def reference(tokenizer: Any, answer: list[int], stops: list[str]) -> int | None:
    criterion = StopStringCriteria(tokenizer, stops)
    ends = (n for n in range(1, len(answer) + 1) if criterion(torch.tensor([answer[:n]]), None))
    return next(ends, None)


@settings(max_examples=120)
@given(data=st.data())
def test_ends_are_those_of_transformers(tokenizer: Any, data: st.DataObject) -> None:
    """Any ids at all, broken bytes and special tokens among them, and strings cut out of what they say."""
    answer = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    said = tokenizer.decode(answer, skip_special_tokens=False).replace("\ufffd", "") or "a"
    parts = st.tuples(st.integers(0, len(said) - 1), st.integers(1, 6)).map(lambda p: said[p[0] : sum(p)])
    stops = data.draw(st.lists(parts | st.sampled_from(["e", "the", "é", "</s>"]), min_size=1, max_size=3))
    assert end(tokenizer, answer, stops) == reference(tokenizer, answer, stops)


def ids_of(tokenizer: Any, *pieces: str) -> list[int]:
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(pieces))
    assert tokenizer.unk_token_id not in ids
    return ids


@pytest.mark.parametrize(
    ("pieces", "stops", "length"),
    [
        (["▁the", "▁expert", "s", "▁."], ["experts"], 3),
        (["▁the", "▁expert", "s", "▁."], ["e exp"], 2),  # it begins and ends within a token
        (["▁the", "▁expert", "s", "▁."], ["s .", "rts", "nowhere"], 3),
        (["▁the", "▁expert", "s", "▁."], ["xper"], 2),
        (["s", "<0xC3>", "<0xA9>", "e"], ["é"], 3),  # before the text has it: bytes are shown when they end
        (["s", "<0xC3>", "<0xA9>", "e"], ["sé"], 3),
        (["<0xE4>", "<0xBD>", "<0xA0>", "你好"], ["你你"], 4),
        (["s", "</s>", "e"], ["</s>"], 2),
        (["s", "</s>", "e"], ["se"], None),
        (["router"], ["router", "rout"], 1),
    ],
)
def test_ends_between_tokens_and_bytes(pieces: list[str], stops: list[str], length: int | None) -> None:
    tokenizer = sentencepiece_like(metaspace=False)
    answer = ids_of(tokenizer, *pieces)
    assert end(tokenizer, answer, stops) == length == reference(tokenizer, answer, stops)


def test_the_prompt_does_not_count() -> None:
    tokenizer = sentencepiece_like(metaspace=False)
    ids = ids_of(tokenizer, "▁expert", "s")
    stops = AnswerStops(tokenizer, ["ts"])
    assert stops.completed(ids[:1], 0, ids[1])
    assert not stops.completed(ids[:1], 1, ids[1])


def test_strings_that_no_token_begins_or_ends() -> None:
    """transformers refuses them; here they just do not come."""
    tokenizer = tiny_models.tiny_tokenizer()
    assert end(tokenizer, tokenizer("the expert")["input_ids"], ["\x00\ue000"]) is None


def test_tokens_without_a_name_say_nothing() -> None:
    """Models with padded matrices may pick them."""
    tokenizer = tiny_models.tiny_tokenizer()
    t, e = tokenizer("the")["input_ids"][0], len(tokenizer) + 3
    text = tokenizer.decode([t])
    assert end(tokenizer, [e, t, e, t], [text + text]) == 4


def test_the_vocabulary_is_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second, which a server's other requests would wait; for tensors transformers does it."""
    model = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    tokenizer = tiny_models.tiny_tokenizer()
    (ids,) = tokenizer(["the"])["input_ids"]
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: pytest.fail("gone through"))
    stops = make_settings(model, [5], tokenizer=tokenizer, stop_strings="the").stops
    assert stops is not None
    assert stops.completed([5, *ids[:-1]], 1, ids[-1])
    with pytest.raises(pytest.fail.Exception, match="gone through"):
        make_settings(model, [5], tokenizer=tokenizer, stop_strings="the", stops_in_prompt=True)


@pytest.mark.parametrize("given_stops", [[5], "", ["a", ""], ["\ud800"], 5])
def test_what_is_no_text_is_refused(given_stops: Any) -> None:
    model = tiny_models.tiny_model("mixtral", num_hidden_layers=1)
    tokenizer = tiny_models.tiny_tokenizer()
    with pytest.raises(OptionError, match="stop string"):
        make_settings(model, [5], tokenizer=tokenizer, stop_strings=given_stops)
