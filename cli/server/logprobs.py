"""Log probabilities as OpenAI writes them, each sent once, with the text that its token is part of."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_local.offload.engine.logprobs import LogProbs
from moe_local.offload.engine.text import Detokenizer
from moe_local.offload.engine.token_bytes import TokenBytes
from moe_local.offload.records import Token

LEAST = -9999.0
"""What is written for less, and for minus infinity, which JSON cannot say; OpenAI has the same."""


class Entry(NamedTuple):
    """Of one token: its id, its log probability, the likeliest ids with theirs, where its text begins.

    Before the first token of a prompt is nothing that would make any token likely: it has None.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


class Echo(NamedTuple):
    """A prompt that a completion begins with."""

    ids: Sequence[int]
    text: str
    offsets: Sequence[int]
    """Where each token begins."""

    @classmethod
    def of(cls, tokenizer: Any, ids: Sequence[int]) -> Echo:
        """`tokenizer`: None for a model that has none, whose echoes are empty."""
        if tokenizer is None:
            return cls(ids, "", [0] * len(ids))
        detokenizer = Detokenizer(tokenizer)
        text, offsets = "", []
        for token in ids:
            offsets.append(len(text))
            text += detokenizer.add(token)
        return cls(ids, text + detokenizer.flush(), offsets)


class Entries:
    """Those of one choice that have not been sent.

    Text may be held back, and be cut before a stop string; so an entry waits until something of the text from
    its token on has been let through, or until the answer has ended. Of what is cut there is no entry.
    """

    def __init__(self) -> None:
        self._ready: list[Entry] = []
        self._waiting: deque[Entry] = deque()
        self._length = 0
        """Characters of all tokens so far."""
        self._shown = 0
        """Characters let through."""
        self._ended = False

    def begin(self, echo: Echo, logprobs: Sequence[LogProbs]) -> None:
        """The text begins with a prompt. `logprobs`: of its tokens from the second on."""
        self._ready.append(Entry(echo.ids[0], None, (), 0))
        for token, offset, score in zip(echo.ids[1:], echo.offsets[1:], logprobs, strict=True):
            self._ready.append(Entry(token, *score, offset))
        self._length = self._shown = len(echo.text)

    def add(self, token: Token, shown: str) -> None:
        """The next token, and the text that is let through with it."""
        if self._ended:
            return
        if token.logprob is not None:
            top = token.top_logprobs or ()
            self._waiting.append(Entry(token.id, token.logprob, top, self._length))
        self._length += len(token.text)
        self._shown += len(shown)

    def end(self, *, cut: bool) -> None:
        """No token follows that counts. `cut`: what has not been let through never will be."""
        if cut:
            self._waiting = deque(entry for entry in self._waiting if entry.offset < self._shown)
        self._ended = True

    def take(self) -> list[Entry]:
        """What can be sent by now, and has not been."""
        taken, self._ready = self._ready, []
        while self._waiting and (self._ended or self._waiting[0].offset < self._shown):
            taken.append(self._waiting.popleft())
        return taken


class TokenNames:
    """Ids as clients see them."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: None for a model that has none, whose tokens are called by their ids."""
        self._bytes = None if tokenizer is None else TokenBytes(tokenizer)

    def text(self, token: int) -> str:
        """With a replacement character for what is not whole."""
        return f"token_id:{token}" if self._bytes is None else self._bytes.of(token).decode(errors="replace")

    def chat(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """choices[].logprobs of a chat."""
        content = [
            {
                **self._scored(entry.token, entry.logprob),
                "top_logprobs": [self._scored(*pair) for pair in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def completion(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """choices[].logprobs of a completion.

        A place's dictionary has the token that stands there, too, be it likely or not. Of tokens that read
        alike it has the likeliest.
        """
        return {
            "tokens": [self.text(entry.token) for entry in entries],
            "token_logprobs": [_number(entry.logprob) for entry in entries],
            "top_logprobs": [self._by_text(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        known = None if self._bytes is None else list(self._bytes.of(token))
        return {"token": self.text(token), "logprob": _number(logprob), "bytes": known}

    def _by_text(self, entry: Entry) -> dict[str, float | None] | None:
        if entry.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            found.setdefault(self.text(token), _number(logprob))
        return found


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(LEAST, logprob)
