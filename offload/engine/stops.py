"""Stop strings: whether an answer ends with its newest token, since that completes one of them.

transformers answers this from tables over the whole vocabulary, which it makes for each set of strings: half
a second and more for 150,000 tokens. The bytes of an answer's last tokens say the same, without preparation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from moe_local.cache.errors import OptionError
from moe_local.offload.engine.token_bytes import TokenBytes


class Stops(Protocol):
    """The stop strings of one sequence."""

    def completed(self, ids: Sequence[int], prompt_len: int, token: int) -> bool:
        """Whether `token` completes one of them. `ids`: those before it, the prompt's and the answer's."""


class AnswerStops:
    """Stop strings within the answer: the prompt does not count, nor where the two meet.

    A token completes a string whose last byte is one of its own; what follows that in the token does not
    matter. Special tokens count by their names.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        """`strings`: as `stop_strings` gives them. Raises OptionError if there is no tokenizer."""
        if tokenizer is None:
            raise OptionError(
                "stop strings need a tokenizer; put its tokenizer.json into the model's folder, or leave "
                "them out"
            )
        self._bytes = TokenBytes(tokenizer)
        self._stops = tuple(string.encode() for string in strings)

    def completed(self, ids: Sequence[int], prompt_len: int, token: int) -> bool:
        # Decided in bytes, since a token may be half a character, and in the ids alone, since a step that
        # fails is run again.
        new = self._bytes.of(token)
        possible = [stop for stop in self._stops if stop[-1] in new]
        if not possible:
            return False
        text = self._tail(ids, prompt_len, max(map(len, possible)) - 1) + new
        return any(stop in text[-(len(new) + len(stop) - 1) :] for stop in possible)

    def _tail(self, ids: Sequence[int], start: int, nbytes: int) -> bytes:
        """The bytes of the last tokens of ids[start:], `nbytes` of them or more, or all."""
        pieces: list[bytes] = []
        at = len(ids)
        while nbytes > 0 and at > start:
            at -= 1
            pieces.append(self._bytes.of(ids[at]))
            nbytes -= len(pieces[-1])
        return b"".join(reversed(pieces))


class TensorStops:
    """transformers' own, for callers of its generate: a stop string may begin in the prompt."""

    def __init__(self, hf: Any, config: Any, tokenizer: Any) -> None:
        """`config`: a GenerationConfig with stop strings. Raises what transformers raises."""
        criteria = hf._get_stopping_criteria(config, StoppingCriteriaList(), tokenizer=tokenizer)
        self._criterion = next(item for item in criteria if isinstance(item, StopStringCriteria))

    def completed(self, ids: Sequence[int], prompt_len: int, token: int) -> bool:
        latest = [*ids[-self._criterion.maximum_token_len :], token]
        return bool(self._criterion(torch.tensor([latest]), None))


def stop_strings(given: str | Iterable[str]) -> list[str] | None:
    """One or several strings as a list; None for an empty one. Raises OptionError for what is no text."""
    strings = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    for string in strings:
        if not isinstance(string, str) or not string:
            raise OptionError(f"stop string {string!r} is not a text of one character or more")
        try:
            string.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"stop string {string!r} has half a character; give whole ones") from error
    return strings or None
