"""How thinking models mark their thoughts, and prompts that begin one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class ThoughtMarks(NamedTuple):
    """What stands around a thought."""

    opening: str
    closing: str
    name: str = ""
    """What stands behind the opening mark in front of each thought."""

    @property
    def begin(self) -> str:
        return self.opening + self.name


THINK = ThoughtMarks("<think>", "</think>")
"""As templates of Qwen, DeepSeek, GLM and many others have them."""
GEMMA = ThoughtMarks("<|channel>", "<channel|>", "thought\n")
MISTRAL = ThoughtMarks("[THINK]", "[/THINK]")
CHANNEL, START, MESSAGE = "<|channel|>", "<|start|>", "<|message|>"
"""As gpt-oss has them: thoughts are messages in a channel of their own."""

LATEST = 16
"""Last tokens of a prompt that tell what it has begun: no tokenizer needs more for it."""


def opened_thought(tokenizer: Any, ids: Sequence[int]) -> ThoughtMarks | None:
    """The marks of the thought inside which a prompt of these ids ends, as with some templates."""
    end = tokenizer.decode(ids[-LATEST:]).rstrip()
    return next((marks for marks in (THINK, GEMMA, MISTRAL) if end.endswith(marks.begin.rstrip())), None)
