"""How thinking models mark their thoughts, and prompts that begin one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

OPEN_THOUGHT, CLOSE_THOUGHT = "<think>", "</think>"
"""As templates of Qwen, DeepSeek, GLM and many others have them."""
CHANNEL, START, MESSAGE = "<|channel|>", "<|start|>", "<|message|>"
"""As gpt-oss has them: thoughts are messages in a channel of their own."""

LATEST = 16
"""Last tokens of a prompt that tell what it has begun: no tokenizer needs more for it."""
_THOUGHT_CLOSED = re.compile(re.escape(CLOSE_THOUGHT))
_FINAL_BEGUN = re.compile(r"<\|channel\|>\s*final\b[^<]*(<\|constrain\|>[^<]*)?<\|message\|>")


def opens_thought(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether a prompt of these ids ends inside a thought, as some templates do."""
    return bool(tokenizer.decode(ids[-LATEST:]).rstrip().endswith(OPEN_THOUGHT))


def before_answer(tokenizer: Any, ids: Sequence[int]) -> re.Pattern[str] | None:
    """What an answer to a prompt of these ids has in front of its content; None: nothing known."""
    if opens_thought(tokenizer, ids):
        return _THOUGHT_CLOSED
    begins_message = tokenizer.decode(ids[-LATEST:]).endswith(f"{START}assistant")
    return _FINAL_BEGUN if begins_message else None
