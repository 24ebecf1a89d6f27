"""A finished answer as a message, which can be appended to its conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.offload.answer_format.answer_format import AnswerFormat
from moe_local.offload.answer_format.answer_parser import AnswerParser
from moe_local.offload.answer_format.piece import tool_call
from moe_local.offload.engine.text import Detokenizer


class MessageReader:
    """Reads the tokens of one answer. Keeps the tokenizer, not the model."""

    def __init__(
        self,
        answers: AnswerFormat,
        prompt_ids: Sequence[int],
        functions: Mapping[str, Any] | None,
        *,
        plain: bool,
    ) -> None:
        """`functions`: see AnswerFormat.parser. `plain`: all text is content."""
        self._answers = answers
        self._prompt_ids = prompt_ids
        self._functions = functions
        self._plain = plain

    def read(self, token_ids: Sequence[int], *, cut: bool) -> dict[str, Any]:
        """OpenAI's message: role and content, and `reasoning_content` and `tool_calls` where there are any.

        `cut`: see Parser.flush.
        """
        parser = (
            AnswerParser(plain=True)
            if self._plain
            else self._answers.parser(self._prompt_ids, functions=self._functions)
        )
        detokenizer = Detokenizer(
            self._answers.tokenizer, () if self._plain else self._answers.tokens.special
        )
        text = "".join(map(detokenizer.add, token_ids)) + detokenizer.flush()
        pieces = [*parser.add(text), *parser.flush(cut=cut)]
        reasoning = "".join(piece.reasoning for piece in pieces)
        calls = [tool_call(piece.call, self._answers.call_id()) for piece in pieces if piece.call is not None]
        return {
            "role": "assistant",
            "content": "".join(piece.content for piece in pieces),
            **({"reasoning_content": reasoning} if reasoning else {}),
            **({"tool_calls": calls} if calls else {}),
        }
