"""How thinking models mark their thoughts, and prompts that begin one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OPEN_THOUGHT, CLOSE_THOUGHT = "<think>", "</think>"
"""As templates of Qwen, DeepSeek, GLM and many others have them."""


def opens_thought(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether a prompt of these ids ends inside a thought, as some templates do."""
    return bool(tokenizer.decode(ids[-8:]).rstrip().endswith(OPEN_THOUGHT))
