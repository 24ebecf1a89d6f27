"""The format of a model's answers: how they are read, demanded, and shown to the model again."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from moe_local.cache.errors import OptionError
from moe_local.offload.answer_format.mark_tokens import MarkTokens
from moe_local.offload.answer_format.piece import Parser
from moe_local.offload.answer_format.template_needs import EFFORT, QUESTION, SWITCHES, TemplateNeeds

Message = Mapping[str, Any]
CALLED, RESULT = "probed_function", "probed_result"
"""In a conversation that shows what the template does with calls."""
CALLING: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": CALLED, "type": "function", "function": {"name": CALLED, "arguments": "{}"}}],
}


def template_text(tokenizer: Any) -> str:
    """The chat template; of several, all; none without a tokenizer."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template)


class AnswerFormat(ABC):
    """What a model's chat template and its answers have in common. Any thread."""

    ends: tuple[str, ...] = ()
    """Marks that end an answer, beside the checkpoint's own end tokens..."""
    part_ends: tuple[str, ...] = ()
    """...and those that end a part of it only."""
    thought_mark: str
    """What a thought begins with."""

    def __init__(self, tokenizer: Any, tokens: MarkTokens) -> None:
        """`tokens`: of all of the format's marks."""
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.needs = TemplateNeeds(tokenizer)
        self._template = template_text(tokenizer)

    def is_of(self, tokenizer: Any) -> bool:
        """Whether it was chosen for this tokenizer with the chat template that this has now."""
        return tokenizer is self.tokenizer and template_text(tokenizer) == self._template

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `Model.stream` for a text that has all that the parser looks for."""
        return {"marks": self.tokens.special} if self.tokens.special else {}

    @abstractmethod
    def parser(
        self,
        prompt_ids: Sequence[int],
        *,
        functions: Mapping[str, Any] | None = None,
        one_call: bool = False,
    ) -> Parser:
        """A parser of the answer to a prompt.

        `functions`: parameters, as JSON schemas, of the functions that may be called; None: calls count as
        content. `one_call`: nothing counts behind the first call.
        """

    @abstractmethod
    def leading(self, prompt_ids: Sequence[int]) -> str | None:
        """Lark of an answer to a prompt, with all that may or has to come before what is demanded of it,
        for which `@content` stands; None: nothing may."""

    @abstractmethod
    def grammar(self, functions: Mapping[str, Any], schema: str | None = None) -> str:
        """Lark of a call of one of the functions, for `Model.generate(grammar=...)`.

        `schema`: right side of a rule for what may be the answer instead; None: it has to be a call.
        """

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """A conversation as the chat template wants it. `messages` are OpenAI's, their content text.

        Earlier calls have ids of the kind that the template wants, whoever made them.
        """
        ids = self.call_ids(messages)
        return [self.needs.message(_with_ids(message, ids)) for message in messages]

    def check_places(self, messages: Sequence[Message]) -> None:
        """Raises OptionError for calls, and results of calls, that the chat template would leave out."""
        for index, message in enumerate(messages):
            called, result = bool(calls_of(message)), message.get("role") == "tool"
            if (called and not self._shows[0]) or (result and not self._shows[1]):
                what = "calls of tools" if called else "the result of a call"
                raise OptionError(
                    f"message {index} has {what}, for which this model's chat template has no place; leave "
                    "calls and their results out, or load the model with another chat template"
                )

    @cached_property
    def _shows(self) -> tuple[bool, bool]:
        """Whether the chat template shows calls, and whether it shows results; what it refuses, it shows: the
        refusal will say why."""
        if (shown := self.shown_call()) is not None:
            return CALLED in shown, RESULT in shown
        alone = self.needs.rendered(self.messages([*QUESTION, CALLING, *QUESTION]))
        return alone is None or CALLED in alone, True

    def shown_call(self, variables: Mapping[str, Any] = MappingProxyType({})) -> str | None:
        """A prompt of a call of CALLED with RESULT behind it; None where the chat template refuses it.

        `variables`: of the template.
        """
        result = {"role": "tool", "tool_call_id": CALLED, "content": RESULT}
        tools = self.tools([{"type": "function", "function": {"name": "other"}}])
        return self.needs.rendered(self.messages([*QUESTION, CALLING, result]), tools, variables)

    def tools(self, tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Tools as the chat template wants them."""
        return None if tools is None else [self.needs.tool(tool) for tool in tools]

    def thinking(self, on: bool) -> dict[str, Any]:
        """What for `variables` turns thoughts on or off. Raises OptionError if the chat template cannot."""
        if not self.needs.switches and not self.needs.effort_is_switch:
            raise OptionError(
                f"thoughts cannot be turned {'on' if on else 'off'}: this model's chat template has no "
                f"{', '.join(SWITCHES)} or {EFFORT} that does; leave it to the model"
            )
        return dict.fromkeys(self.needs.switches or SWITCHES[:1], on)

    def variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of the chat template as it wants them."""
        return self.needs.variables(given)

    def call_id(self) -> str:
        """A new id for a call."""
        return f"call_{uuid.uuid4().hex[:24]}"

    def call_ids(self, messages: Sequence[Message]) -> dict[str, str]:
        """Other ids for those calls of a conversation that need one."""
        return {}


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters of the functions among the tools, by their names."""
    functions = [tool.get("function") for tool in tools]
    return {
        function["name"]: function.get("parameters")
        for function in functions
        if isinstance(function, Mapping) and isinstance(function.get("name"), str)
    }


def calls_of(message: Message) -> list[Any]:
    """The tool calls in a message."""
    return list(message.get("tool_calls") or ())


def _with_ids(message: Message, ids: Mapping[str, str]) -> dict[str, Any]:
    changed = dict(message)
    if calls_of(message):
        changed["tool_calls"] = [_renamed(call, "id", ids) for call in calls_of(message)]
    return _renamed(changed, "tool_call_id", ids)


def _renamed(holder: Mapping[str, Any], key: str, ids: Mapping[str, str]) -> dict[str, Any]:
    old = holder.get(key)
    return {**holder, key: ids[old]} if isinstance(old, str) and old in ids else dict(holder)
