"""The tokens that end an answer, where a checkpoint does not name all of them."""

from __future__ import annotations

from typing import Any

from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.answer_format.mark_tokens import MarkTokens


def complete_ends(generation_config: Any, answers: AnswerFormat) -> None:
    """Add what ends an answer by its format, and take out what only ends a part of it.

    gpt-oss ends with `<|return|>` or `<|call|>`, but its thoughts, too, end with `<|end|>`. Its
    generation_config says so; a GGUF file may name one of them only. Gemma 4 begins a call's result itself.
    """
    if not answers.ends:
        return
    said = generation_config.eos_token_id
    before = said if isinstance(said, list) else [] if said is None else [said]
    tokens = MarkTokens(answers.tokenizer, (*answers.ends, *answers.part_ends)).ids
    inner = {tokens.get(mark) for mark in answers.part_ends}
    added = [tokens[mark] for mark in answers.ends if mark in tokens]
    generation_config.eos_token_id = [
        token for token in dict.fromkeys([*before, *added]) if token not in inner
    ] or None
