"""Answers of Llama 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.offload.answer_format.answer_format import template_text
from moe_local.offload.answer_format.answer_parser import AnswerParser
from moe_local.offload.answer_format.llama import Llama
from moe_local.offload.answer_format.llama_parser import LlamaParser
from moe_local.offload.answer_format.marked import MarkedFormat
from moe_local.offload.answer_format.piece import Parser
from moe_local.offload.thoughts import opened_thought

TURN = "<|header_start|>"
PYTHON = "(param1=value1"
"""In the words with which templates ask for calls in Python."""


class LlamaFormat(MarkedFormat):
    """The usual format but for calls, which are told from content by what they say."""

    ends = ("<|eot|>", "<|eom|>")

    def __init__(self, tokenizer: Any) -> None:
        self._calls = Llama(python=PYTHON in template_text(tokenizer))
        super().__init__(tokenizer, self._calls)

    def parser(
        self,
        prompt_ids: Sequence[int],
        *,
        functions: Mapping[str, Any] | None = None,
        one_call: bool = False,
    ) -> Parser:
        thinking = opened_thought(self.tokenizer, prompt_ids) is not None
        thoughts = AnswerParser(thoughts=self.thoughts, thinking=thinking)
        return LlamaParser(thoughts, self._calls, functions, one_call=one_call)
