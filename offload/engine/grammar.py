"""Constrained decoding: before each token, tokens that cannot lead to an answer of the given form are masked.

llguidance compiles the schema or grammar and says which tokens may follow. Only whether the answer may end is
decided here, since checkpoints have several tokens that end it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers.generation.logits_process import LogitsProcessor

from moe_local.cache.errors import OptionError, first_line

KEPT = 64
"""Compiled grammars that are kept for each tokenizer, those used last."""

logger = logging.getLogger(__name__)


class _Vocabulary:
    """A tokenizer's vocabulary in llguidance's form, and the grammars that were compiled for it."""

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
        """A new LLMatcher, owned by the caller. A cached grammar does not wait while another is compiled."""
        kept = self._compiled.get(grammar)
        if kept is None:
            with self._compiling:
                kept = self._compiled.get(grammar) or self._compile(grammar)
                self._compiled[grammar] = kept
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        else:
            with suppress(KeyError):  # another thread has dropped it meanwhile
                self._compiled.move_to_end(grammar)
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
    """An llguidance LLMatcher, owned by the caller. `vocabulary`: the number of logits.

    The first call for a tokenizer takes up to a second, and so may the first for a grammar, which is then
    cached. Any thread. Raises OptionError for grammars and tokenizers that llguidance does not support.
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
    """Sets the scores of tokens that the grammar does not allow to -inf. Serves one sequence.

    If something else forces a token against the grammar, the answer ends after it.
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
        """`grammar`: of all that follows the prompt. `ends`: the tokens that end an answer. Raises
        OptionError as `matcher`, and if `ends` is empty."""
        if not ends:
            raise OptionError(
                "a schema or grammar needs a token that ends the answer, and there is none; give eos_token_id"
            )
        self._matcher = matcher(tokenizer, grammar, vocabulary)
        self._ends = sorted(ends)
        self._seen = len(prompt_ids)
        self._lost = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [1, length], scores [1, vocabulary] -> masked scores; the given ones are not changed."""
        new = input_ids[0, self._seen :].tolist()
        self._seen += len(new)
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
