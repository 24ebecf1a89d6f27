"""The prompts of measurements: text of this repository, since random tokens are routed unlike any text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from moe_local.demo.wordings_topics import TOPICS
from moe_local.offload.engine.text import encode_prompt

FIRST_BYTE = 3
"""Id of byte 0 for models without a tokenizer; the first ids are mostly special ones."""


class Topic(NamedTuple):
    """A topic that the demo model can talk about, and so larger models can, too."""

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
    """All sentences of the topics in an endless cycle, from a topic on that depends on `number`."""
    every = topics()
    first = 7 * number % len(every)
    return itertools.cycle([s for topic in every[first:] + every[:first] for s in topic.sentences])


class Conversation:
    """The ids of a growing conversation, made with the chat template if there is one."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` may be None; ids are then the text's bytes."""
        self._tokenizer = tokenizer
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []
        self._templated = tokenizer is not None and bool(getattr(tokenizer, "chat_template", None))

    def ask(self, question: str) -> list[int]:
        """The prompt for the next answer, including all earlier messages."""
        if self._templated:
            self._messages.append({"role": "user", "content": question})
            return encode_prompt(self._tokenizer, self._messages)
        self._ids += encode(self._tokenizer, question + "\n")
        return list(self._ids)

    def answered(self, text: str, ids: Sequence[int]) -> None:
        """Add the model's answer to the conversation."""
        self._messages.append({"role": "assistant", "content": text})
        self._ids += ids


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text; without a tokenizer, those of its bytes."""
    if tokenizer is None:
        return [FIRST_BYTE + byte for byte in text.encode()]
    return encode_prompt(tokenizer, text, template=False)


def long_prompt(tokenizer: Any, number: int, tokens: int) -> list[int]:
    """The first `tokens` ids of `prose(number)`."""
    ids: list[int] = []
    for sentence in prose(number):
        if len(ids) >= tokens:
            break
        ids += encode(tokenizer, f" {sentence}" if ids else sentence)
    return ids[:tokens]
