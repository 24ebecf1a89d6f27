"""Answers that are JSON of a given schema: before each token, those are ruled out that lead to none.

What may follow is llguidance's to say, which compiles schemas; only an end of the answer is ours to allow,
since checkpoints have several tokens for it.
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
"""Schemas that stay compiled, for each tokenizer."""

LOOKED_BACK = 16
"""Tokens in which the end of a thought is looked for: no tokenizer makes more of the mark."""

logger = logging.getLogger(__name__)


class _Vocabulary:
    """A tokenizer's tokens as llguidance wants them, and the schemas that were compiled for them."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        from llguidance.hf import from_tokenizer

        try:
            self._tokens = from_tokenizer(tokenizer, n_vocab=size)
        except Exception as error:  # each kind of tokenizer fails in its own way
            raise OptionError(
                f"json_schema cannot be kept with this model's tokenizer: {first_line(error)}"
            ) from error
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._compiling = Lock()

    def matcher(self, schema: str) -> Any:
        """An LLMatcher at its beginning, the caller's. One that is kept waits for none that is compiled."""
        kept = self._compiled.get(schema)
        if kept is None:
            with self._compiling:
                kept = self._compiled.get(schema) or self._compile(schema)
                self._compiled[schema] = kept
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        return kept.deep_copy()

    def _compile(self, schema: str) -> Any:
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE})
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            why = " ".join(matcher.get_error().split())
            raise OptionError(f"json_schema cannot be kept: {why}")
        return matcher


_vocabularies: WeakKeyDictionary[Any, dict[int, _Vocabulary]] = WeakKeyDictionary()
_making = Lock()


def json_matcher(tokenizer: Any, schema: Any, vocabulary: int) -> Any:
    """An llguidance LLMatcher, the caller's own. `vocabulary`: how many scores a token has.

    The first for a tokenizer takes up to a second, and so may a schema, which is compiled once. Any thread.
    Raises OptionError for what is no schema or asks for what llguidance cannot do, and for tokenizers that it
    cannot read.
    """
    if tokenizer is None:
        raise OptionError("json_schema needs a tokenizer; put its tokenizer.json into the model's folder")
    if not isinstance(schema, Mapping):
        raise OptionError(f"json_schema is of type {type(schema).__name__}; it must be a dict, a JSON schema")
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise OptionError(f"json_schema is no JSON: {first_line(error)}") from error
    except RecursionError as error:
        raise OptionError("json_schema is nested too deeply; give a flatter one") from error
    with _making:
        sizes = _vocabularies.setdefault(tokenizer, {})
        if vocabulary not in sizes:
            sizes[vocabulary] = _Vocabulary(tokenizer, vocabulary)
    return sizes[vocabulary].matcher(text)


class JsonMask(LogitsProcessor):  # type: ignore[misc]
    """Rules out what the schema does not allow to follow; -inf is its score. Serves one sequence.

    Where the prompt ends inside a thought (`<think>`), the answer is free until that is closed. A token that
    something else has forced against the schema ends the answer.
    """

    def __init__(
        self, tokenizer: Any, schema: Any, prompt_ids: Sequence[int], *, vocabulary: int, ends: frozenset[int]
    ) -> None:
        """`ends`: the tokens that end an answer. Raises OptionError as json_matcher, and for none."""
        if not ends:
            raise OptionError("json_schema needs a token that ends an answer, and this model has none")
        self._matcher = json_matcher(tokenizer, schema, vocabulary)
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
        logger.warning("an answer ends before it is JSON of its schema: %s", why)
