"""The format of a model's answers, by marks in its chat template."""

from __future__ import annotations

from typing import Any

from moe_local.offload.answer_format.answer_format import AnswerFormat, template_text
from moe_local.offload.answer_format.deepseek import DeepSeek
from moe_local.offload.answer_format.dsml import DSML, Dsml
from moe_local.offload.answer_format.gemma import Gemma
from moe_local.offload.answer_format.gemma_format import GemmaFormat
from moe_local.offload.answer_format.glm import Glm
from moe_local.offload.answer_format.granite import Granite
from moe_local.offload.answer_format.harmony import HarmonyFormat
from moe_local.offload.answer_format.hermes import Hermes
from moe_local.offload.answer_format.kimi import Kimi
from moe_local.offload.answer_format.kimi_format import KimiFormat
from moe_local.offload.answer_format.lfm import TOOLS, Lfm
from moe_local.offload.answer_format.llama_format import TURN, LlamaFormat
from moe_local.offload.answer_format.marked import MarkedFormat
from moe_local.offload.answer_format.minimax import MiniMax
from moe_local.offload.answer_format.mistral import ARGUMENTS, Mistral
from moe_local.offload.answer_format.mistral_format import MistralFormat
from moe_local.offload.answer_format.qwen_xml import QwenXml
from moe_local.offload.thoughts import CHANNEL, MISTRAL, THINK


def answer_format(tokenizer: Any) -> AnswerFormat:
    """To be chosen once for a model. Without a tokenizer, or a mark that is known, it is Qwen3's."""
    if tokenizer is None:
        return MarkedFormat(None, Hermes())
    return _choose(tokenizer, template_text(tokenizer))


def _choose(tokenizer: Any, template: str) -> AnswerFormat:
    """The format that a template's marks speak for."""
    if CHANNEL in template and "<|message|>" in template:
        return HarmonyFormat(tokenizer)
    if Gemma.opening in template:
        return GemmaFormat(tokenizer)
    if Kimi.opening in template:
        return KimiFormat(tokenizer, Kimi())
    if Mistral.opening in template:
        thoughts = MISTRAL if MISTRAL.opening in template else THINK
        return MistralFormat(tokenizer, Mistral(listed=ARGUMENTS not in template), thoughts)
    if Lfm.opening in template or TOOLS in template:
        return MarkedFormat(tokenizer, Lfm())
    if Granite.opening in template:
        return MarkedFormat(tokenizer, Granite())
    if DSML in template:
        block = "function_calls" if "function_calls>" in template else "tool_calls"
        return MarkedFormat(tokenizer, Dsml(block))
    if DeepSeek.opening in template:
        return MarkedFormat(tokenizer, DeepSeek(fenced="```json" in template))
    if "<minimax:tool_call>" in template:
        return MarkedFormat(tokenizer, MiniMax())
    if "<function=" in template and QwenXml.opening in template:
        return MarkedFormat(tokenizer, QwenXml())
    if TURN in template:
        return LlamaFormat(tokenizer)
    if "<arg_key>" in template:
        return MarkedFormat(tokenizer, Glm(breaks="</arg_key><arg_value>" not in template))
    return MarkedFormat(tokenizer, Hermes())
