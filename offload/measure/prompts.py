"""What a model is asked while it is measured: text of this repository; random tokens route as none do."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from moe_local.demo.wordings_topics import TOPICS
from moe_local.offload.engine.text import encode_prompt

FIRST_BYTE = 3
"""Id of byte 0 for models without a tokenizer: the first ids are mostly special ones."""


class Topic(NamedTuple):
    """Something the demo can talk about, and so can larger models."""

    name: str
    sentences: tuple[str, ...]


@lru_cache(maxsize=1)
def topics() -> tuple[Topic, ...]:
    """All topics of the demo's training text, in its order."""
    found = []
    for block in re.split(r"^@ ", TOPICS, flags=re.MULTILINE)[1:]:
        head, *lines = block.splitlines()
        name = head.partition(":")[2].partition("|")[0].strip()
        sentences = (line.partition(": ") for line in lines)
        found.append(Topic(name, tuple(text for key, _, text in sentences if key.isalpha() and text)))
    return tuple(found)


def questions(number: int, turns: int) -> list[str]:
    """What a user asks in conversation `number`: a topic, a follow-up, then another topic, and so on."""
    names = [topic.name for topic in topics()]
    asked = []
    for turn in range(turns):
        name = names[(5 * number + 11 * (turn // 2)) % len(names)]
        follow_up = "why?" if turn % 4 == 1 else "can you give me an example?"
        asked.append(follow_up if turn % 2 else f"what is {name}?")
    return asked


def prose(number: int) -> Iterator[str]:
    """All sentences of the topics, from the `number`-th topic on and around, without end."""
    every = topics()
    first = 7 * number % len(every)
    return itertools.cycle([s for topic in every[first:] + every[:first] for s in topic.sentences])


class Conversation:
    """The ids of one conversation as it grows; through the chat template where there is one."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` may be None: then ids are the text's bytes."""
        self._tokenizer = tokenizer
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []
        self._templated = tokenizer is not None and bool(getattr(tokenizer, "chat_template", None))

    def ask(self, question: str) -> list[int]:
        """The prompt of the next answer, with all that was said before."""
        if self._templated:
            self._messages.append({"role": "user", "content": question})
            return encode_prompt(self._tokenizer, self._messages)
        self._ids += encode(self._tokenizer, question + "\n")
        return list(self._ids)

    def answered(self, text: str, ids: Sequence[int]) -> None:
        """What the model said."""
        self._messages.append({"role": "assistant", "content": text})
        self._ids += ids


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text; its bytes without a tokenizer."""
    if tokenizer is None:
        return [FIRST_BYTE + byte for byte in text.encode()]
    return encode_prompt(tokenizer, text, template=False)


def long_prompt(tokenizer: Any, number: int, tokens: int) -> list[int]:
    """So many ids of prose."""
    ids: list[int] = []
    for sentence in prose(number):
        if len(ids) >= tokens:
            break
        ids += encode(tokenizer, f" {sentence}" if ids else sentence)
    return ids[:tokens]
