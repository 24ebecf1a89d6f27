"""Answers that are JSON of a schema, whatever the model would rather say."""

from __future__ import annotations

import gc
import itertools
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import moe_local
from moe_local.cache.errors import OptionError
from moe_local.offload.engine import grammar
from moe_local.offload.engine.grammar import KEPT, GrammarMask, matcher
from moe_local.offload.forms import json_grammar

VOCABULARY = 2048
SCHEMA = {
    "type": "object",
    "properties": {
        "topic": {"enum": ["cache", "router"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
    },
    "required": ["topic", "count", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(repository: Path) -> Any:
    return AutoTokenizer.from_pretrained(repository / "demo" / "model")


@pytest.fixture(scope="module")
def demo() -> Any:
    with moe_local.load("demo", device="cpu", parallel=3) as model:
        yield model


def check(text: str) -> None:
    answer = json.loads(text)
    assert list(answer) == ["topic", "count", "sure"]
    assert answer["topic"] in ("cache", "router")
    assert answer["count"] in range(100)
    assert answer["sure"] in (True, False)


def mask_of(tokenizer: Any, schema: Any) -> tuple[GrammarMask, list[int]]:
    ids = tokenizer("Say JSON:")["input_ids"]
    ends = frozenset({tokenizer.eos_token_id, 0})
    return GrammarMask(tokenizer, json_grammar(schema), ids, vocabulary=VOCABULARY, ends=ends), ids


def allowed(mask: GrammarMask, ids: list[int]) -> set[int]:
    scores = torch.zeros(1, VOCABULARY)
    found = mask(torch.tensor([ids]), scores)
    assert not scores.any()
    assert set(found[0].unique().tolist()) <= {0.0, -torch.inf}
    return set(found[0].isfinite().nonzero().flatten().tolist())


def test_each_token_is_held_against_the_text_that_it_makes(tokenizer: Any) -> None:
    """A schema of few texts: a token may follow if and only if one of them goes on with it."""
    texts = ['{"a":1}', '{"a":12}', '{"a":2}']
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 12, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    spaced = [t.replace(":", c + ":") for t in texts for c in ("", " ")]
    spaced = [t.replace(":", ":" + c) for t in spaced for c in ("", " ")]
    pieces = [tokenizer.decode([token]) for token in range(VOCABULARY)]
    special = set(tokenizer.all_special_ids)
    for text in ('{"a":12}', '{"a" : 2}'):
        mask, ids = mask_of(tokenizer, schema)
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        for at in range(len(answer)):
            said = tokenizer.decode(answer[:at])
            may = allowed(mask, ids + answer[:at])
            for token in range(VOCABULARY):
                if token not in special and "\n" not in pieces[token]:
                    goes_on = any(t.startswith(said + pieces[token]) for t in spaced) and pieces[token] != ""
                    # where white space may stand there is more than these few
                    if goes_on:
                        assert token in may, (said, pieces[token])
                    elif pieces[token].strip() == pieces[token]:
                        assert token not in may, (said, pieces[token])
        assert allowed(mask, ids + answer) >= {tokenizer.eos_token_id, 0}, "whole: it may end, in any way"


def test_nothing_but_an_end_follows_where_nothing_can(tokenizer: Any) -> None:
    mask, ids = mask_of(tokenizer, {"const": True})
    answer = tokenizer("true", add_special_tokens=False)["input_ids"]
    assert not allowed(mask, ids) & {tokenizer.eos_token_id, 0}
    assert allowed(mask, ids + answer) == {tokenizer.eos_token_id, 0}


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.5, "top_k": 3}]
)
def test_any_way_of_choosing_gives_json(demo: Any, options: dict[str, Any]) -> None:
    for seed in range(3):
        output = demo.generate(
            "What is a router?", json_schema=SCHEMA, seed=seed, max_new_tokens=200, **options
        )
        assert output.finish_reason == "stop"
        check(output.text)


def test_rows_of_one_batch_are_told_apart(demo: Any) -> None:
    ids = torch.tensor([demo.tokenizer("What is a router?")["input_ids"]] * 3)
    options = {"do_sample": True, "seed": 5, "max_new_tokens": 150}
    found = demo.generate(ids, json_schema=SCHEMA, **options)
    texts = [demo.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in found]
    for text in texts:
        check(text)
    assert len(set(texts)) > 1


def test_what_is_likely_is_kept_where_it_is_allowed(demo: Any) -> None:
    """A schema that admits any text leaves the model's own answer as it is."""
    said = demo.generate("What is a router?", max_new_tokens=12).text
    forced = demo.generate("What is a router?", json_schema={"type": "string"}, max_new_tokens=40).text
    assert len(said) > 20
    assert forced.startswith(f'"{said}')


def test_a_token_that_was_forced_against_it_ends_the_answer(tokenizer: Any, caplog: Any) -> None:
    mask, ids = mask_of(tokenizer, SCHEMA)
    wrong = tokenizer("No", add_special_tokens=False)["input_ids"]
    assert allowed(mask, ids + wrong) == {tokenizer.eos_token_id, 0}
    assert allowed(mask, ids + wrong + wrong) == {tokenizer.eos_token_id, 0}
    assert [record.getMessage() for record in caplog.records] == [
        f"an answer ends before its JSON or grammar is complete: token {wrong[0]} was chosen all the same"
    ]


def test_a_step_that_is_made_again_is_no_second_token(tokenizer: Any) -> None:
    mask, ids = mask_of(tokenizer, SCHEMA)
    brace = tokenizer("{", add_special_tokens=False)["input_ids"]
    assert allowed(mask, ids + brace) == allowed(mask, ids + brace)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([], "^json_schema is of type list; it must be a dict"),
        ({"type": "objekt"}, "^this schema or grammar cannot be enforced: Invalid type: objekt"),
        ({"not": {}}, "^this schema or grammar cannot be enforced: .*not"),
        ({"$ref": "#/nowhere"}, "^this schema or grammar cannot be enforced: "),
        ({"pattern": "(?=x)", "type": "string"}, "^this schema or grammar cannot be enforced: .*look"),
        ({"enum": [{1, 2}]}, "^json_schema is not valid JSON"),
    ],
)
def test_schemas_that_cannot_be_kept(tokenizer: Any, schema: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as info:
        matcher(tokenizer, json_grammar(schema), VOCABULARY)
    assert "\n" not in str(info.value)


def test_grammars(demo: Any) -> None:
    lark = 'start: "Yes, " NUMBER " of them."\nNUMBER: /[1-9][0-9]{2}/'
    for seed in range(3):
        text = demo.generate("How many?", grammar=lark, temperature=1.5, seed=seed).text
        assert re.fullmatch(r"Yes, [1-9]\d\d of them\.", text)
    with pytest.raises(OptionError, match=r"^this schema or grammar cannot .*: .*unknown name") as info:
        demo.generate("x", grammar="start: foo")
    assert "\n" not in str(info.value)
    with pytest.raises(OptionError, match=r"^grammar is of type int"):
        demo.generate("x", grammar=3)
    with pytest.raises(OptionError, match=r"^json_schema and grammar cannot be combined"):
        demo.generate("x", grammar=lark, json_schema=SCHEMA)


def test_what_else_is_refused(demo: Any, tokenizer: Any) -> None:
    with pytest.raises(OptionError, match=r"^min_length cannot be combined"):
        demo.generate("x", json_schema=SCHEMA, min_new_tokens=3)
    with pytest.raises(OptionError, match=r"^json_schema cannot be combined with beams"):
        demo.generate(torch.tensor([[5]]), json_schema=SCHEMA, num_beams=2)
    with pytest.raises(OptionError, match="needs a token that ends the answer"):
        GrammarMask(tokenizer, json_grammar(SCHEMA), [5], vocabulary=VOCABULARY, ends=frozenset())
    with pytest.raises(OptionError, match="needs a tokenizer"):
        matcher(None, json_grammar(SCHEMA), VOCABULARY)
    with pytest.raises(OptionError, match=r"^no schema or grammar can be .* this model's tokenizer: "):
        matcher(Slow(), json_grammar(SCHEMA), VOCABULARY)


class Slow:
    """No tokenizer that llguidance could read."""


def test_what_was_compiled_is_kept_as_long_as_its_tokenizer(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(repository / "demo" / "model")
    compiled: list[str] = []
    compile = grammar._Vocabulary._compile
    monkeypatch.setattr(
        grammar._Vocabulary, "_compile", lambda self, text: compiled.append(text) or compile(self, text)
    )
    for schema in ({"const": 1}, {"const": 2}, {"const": 1}):
        matcher(tokenizer, json_grammar(schema), VOCABULARY)
    assert compiled == [json_grammar({"const": 1}), json_grammar({"const": 2})]
    for number in itertools.chain(range(3, 3 + KEPT), [1]):
        matcher(tokenizer, json_grammar({"const": number}), VOCABULARY)
    assert compiled[-1] == json_grammar({"const": 1})
    compiled.clear()
    for number in itertools.chain.from_iterable((1, number) for number in range(100, 110 + KEPT)):
        matcher(tokenizer, json_grammar({"const": number}), VOCABULARY)
    assert len(compiled) == KEPT + 10, "one that is used between all others stays"
    kept = weakref.ref(grammar._vocabularies[tokenizer][VOCABULARY])
    del tokenizer
    gc.collect()
    assert kept() is None
