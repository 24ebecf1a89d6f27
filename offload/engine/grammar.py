"""Answers of a given form, such as JSON of a schema: what leads to none is ruled out before each token.

What may follow is llguidance's to say, which compiles schemas and grammars; only an end of the answer is ours
to allow, since checkpoints have several tokens for it.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers.generation.logits_process import LogitsProcessor

from moe_local.cache.errors import OptionError, first_line
from moe_local.offload.thoughts import CLOSE_THOUGHT, opens_thought

WHITE_SPACE = r"( |\n[ \t]{0,20})?"
"""Between any two signs. More is what a model falls into that would rather not write JSON. As llama.cpp's."""

KEPT = 64
"""Grammars that stay compiled, for each tokenizer."""

LOOKED_BACK = 16
"""Tokens in which the end of a thought is looked for: no tokenizer makes more of the mark."""

logger = logging.getLogger(__name__)


def json_grammar(schema: Any) -> str:
    """JSON of a schema as llguidance's grammar. Raises OptionError for what is no JSON schema at all."""
    from llguidance import LLMatcher

    _check_schema(schema)
    return LLMatcher.grammar_from_json_schema(dict(schema), overrides={"whitespace_pattern": WHITE_SPACE})


def json_rule(schema: Any) -> str:
    """The same for the right side of a rule of a Lark grammar."""
    _check_schema(schema)
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


def lark_grammar(lark: Any) -> str:
    """A grammar in the kind of Lark that llguidance reads. Raises OptionError where it is no text."""
    from llguidance import LLMatcher

    if not isinstance(lark, str):
        raise OptionError(f"grammar is of type {type(lark).__name__}; it must be text, in llguidance's Lark")
    return LLMatcher.grammar_from_lark(lark)


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, Mapping):
        raise OptionError(f"json_schema is of type {type(schema).__name__}; it must be a dict, a JSON schema")
    try:
        json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise OptionError(f"json_schema is not valid JSON: {first_line(error)}") from error
    except RecursionError as error:
        raise OptionError("json_schema is nested too deeply; give a flatter one") from error


class _Vocabulary:
    """A tokenizer's tokens as llguidance wants them, and the grammars that were compiled for them."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        from llguidance.hf import from_tokenizer

        try:
            self._tokens = from_tokenizer(tokenizer, n_vocab=size)
        except Exception as error:  # each kind of tokenizer fails in its own way
            raise OptionError(
                f"no schema or grammar can be enforced with this model's tokenizer: {first_line(error)}"
            ) from error
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._compiling = Lock()

    def matcher(self, grammar: str) -> Any:
        """An LLMatcher at its beginning, the caller's. One that is kept waits for none that is compiled."""
        kept = self._compiled.get(grammar)
        if kept is None:
            with self._compiling:
                kept = self._compiled.get(grammar) or self._compile(grammar)
                self._compiled[grammar] = kept
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        return kept.deep_copy()

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            why = " ".join(matcher.get_error().split())
            raise OptionError(f"this schema or grammar cannot be enforced: {why}")
        return matcher


_vocabularies: WeakKeyDictionary[Any, dict[int, _Vocabulary]] = WeakKeyDictionary()
_making = Lock()


def matcher(tokenizer: Any, grammar: str, vocabulary: int) -> Any:
    """An llguidance LLMatcher, the caller's own. `vocabulary`: how many scores a token has.

    The first for a tokenizer takes up to a second, and so may a grammar, which is compiled once. Any thread.
    Raises OptionError for what asks for more than llguidance can do, and for tokenizers that it cannot read.
    """
    if tokenizer is None:
        raise OptionError(
            "a schema or grammar needs a tokenizer; put its tokenizer.json into the model's folder"
        )
    with _making:
        sizes = _vocabularies.setdefault(tokenizer, {})
        if vocabulary not in sizes:
            sizes[vocabulary] = _Vocabulary(tokenizer, vocabulary)
    return sizes[vocabulary].matcher(grammar)


class GrammarMask(LogitsProcessor):  # type: ignore[misc]
    """Rules out what the grammar does not allow to follow; -inf is its score. Serves one sequence.

    Where the prompt ends inside a thought (`<think>`), the answer is free until that is closed. A token that
    something else has forced against the grammar ends the answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        grammar: str,
        prompt_ids: Sequence[int],
        *,
        vocabulary: int,
        ends: frozenset[int],
    ) -> None:
        """`ends`: the tokens that end an answer. Raises OptionError as `matcher`, and for none."""
        if not ends:
            raise OptionError(
                "a schema or grammar needs a token that ends the answer, and there is none; give eos_token_id"
            )
        self._matcher = matcher(tokenizer, grammar, vocabulary)
        self._tokenizer = tokenizer
        self._ends = sorted(ends)
        self._prompt_len = self._seen = len(prompt_ids)
        self._thinks = opens_thought(tokenizer, prompt_ids)
        self._lost = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [1, length], scores [1, vocabulary], which are left as they are."""
        new = input_ids[0, self._seen :].tolist()
        self._seen += len(new)
        if self._thinks:
            latest = input_ids[0, max(self._prompt_len, self._seen - LOOKED_BACK) :].tolist()
            self._thinks = CLOSE_THOUGHT not in self._tokenizer.decode(latest)
            return scores if self._thinks else self._masked(scores)
        for token in new:
            if not self._lost and not self._matcher.consume_token(token):
                self._lose(f"token {token} was chosen all the same")
        return self._masked(scores)

    def _masked(self, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
        if not self._lost and not self._matcher.is_stopped():
            packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            bits = np.unpackbits(packed, count=len(allowed), bitorder="little")
            allowed = torch.from_numpy(bits).view(torch.bool)
            if self._matcher.is_error():
                self._lose(" ".join(self._matcher.get_error().split()))
                allowed[:] = False
        allowed[self._ends] = self._lost or self._matcher.is_accepting()
        if not allowed.any():
            self._lose("no token of this model may follow")
            allowed[self._ends] = True
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def _lose(self, why: str) -> None:
        self._lost = True
        logger.warning("an answer ends before its JSON or grammar is complete: %s", why)
