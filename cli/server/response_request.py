"""What clients send to `/v1/responses`, OpenAI's newer interface, and the chat that it amounts to.

As in protocol.py, types are taken at their word, and what cannot be honoured is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from moe_local.cache.errors import OptionError
from moe_local.cli.server.allowed_tools import ALLOWED
from moe_local.cli.server.items import Item, as_items, as_messages, shown_name
from moe_local.cli.server.protocol import ChatRequest, OpenAIRequest

LOGPROBS = "message.output_text.logprobs"
THOUGHTS = "reasoning.encrypted_content"
"""Asked for by clients that keep conversations themselves. Thoughts are in the answer as they are."""


REPEATED = (
    *(
        "instructions",
        "max_output_tokens",
        "metadata",
        "parallel_tool_calls",
        "previous_response_id",
        "store",
    ),
    *("temperature", "tool_choice", "top_logprobs", "top_p", "truncation", "user"),
)
"""What a response says of its request as it stands there."""


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})
    verbosity: str | None = None


class ResponseRequest(OpenAIRequest):
    """`POST /v1/responses`: the items of a conversation, or what is new in one that is kept here."""

    input: str | list[Any]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    """False: the answer ends with its first call."""
    max_output_tokens: int | None = None
    include: list[str] = Field(default_factory=list)
    top_logprobs: int = 0
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: dict[str, Any] = Field(default_factory=dict)
    """Its effort is for templates that know it; summaries are none, since thoughts are given whole."""
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: dict[str, str] = Field(default_factory=dict)
    user: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    max_tool_calls: Any = None
    """Of tools that the server would call; there are none."""
    client_metadata: Any = None
    background: Any = None
    conversation: Any = None
    prompt: Any = None

    @field_validator(*REPEATED, "reasoning", "text", "tools", mode="before")
    @classmethod
    def _check_repeated(cls, value: Any, field: ValidationInfo) -> Any:
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise OptionError(
                f"{field.field_name} has half a character or a number such as NaN, which no answer could "
                "repeat; leave them out"
            ) from None
        return value

    @field_validator("input")
    @classmethod
    def _check_input(cls, given: str | list[Item]) -> str | list[Item]:
        if not given:
            raise OptionError("input is empty; give a text, or a list of items")
        as_messages(as_items(given))
        return given

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for index, tool in enumerate(tools):
            _check_tool(f"tools[{index}]", tool)
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _check_tool_choice(cls, choice: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(choice, dict) and choice.get("type") not in ("function", ALLOWED):
            raise OptionError(
                f"tool_choice of type {choice.get('type')!r} is not supported; "
                "auto, none, required, allowed_tools, and a function by its name are"
            )
        return choice

    @field_validator("include")
    @classmethod
    def _check_include(cls, included: list[str]) -> list[str]:
        for what in included:
            if what not in (LOGPROBS, THOUGHTS):
                raise OptionError(f"include of {what!r} is not supported; {LOGPROBS} is")
        return included

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int, field: ValidationInfo) -> int:
        if value and LOGPROBS not in field.data.get("include", ()):
            raise OptionError(f"top_logprobs need {LOGPROBS!r} in include")
        return value

    @field_validator("text")
    @classmethod
    def _check_text(cls, text: TextOptions) -> TextOptions:
        match text.format.get("type"):
            case "text" | "json_object":
                pass
            case "json_schema":
                if not isinstance(text.format.get("schema"), dict):
                    raise OptionError("text.format has no schema; give it, or json_object")
            case kind:
                raise OptionError(
                    f"text.format of type {kind!r} is not supported; text, json_object and json_schema are"
                )
        return text

    @field_validator("reasoning")
    @classmethod
    def _check_reasoning(cls, reasoning: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(reasoning.get("effort"), str | None):
            raise OptionError(f"reasoning.effort is {reasoning['effort']!r}; give a word, such as low")
        return reasoning

    @field_validator("background")
    @classmethod
    def _check_background(cls, background: Any) -> Any:
        if background is not False:
            raise OptionError("background is not supported; leave it out, and wait or ask for a stream")
        return background

    @field_validator("conversation")
    @classmethod
    def _check_conversation(cls, conversation: Any) -> Any:
        raise OptionError("conversation is not supported; give previous_response_id, or all of it as input")

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        raise OptionError("prompt names a template that OpenAI keeps; give instructions and input")

    @property
    def items(self) -> list[Item]:
        return as_items(self.input)

    def chat(self, earlier: Sequence[Item]) -> ChatRequest:
        """The chat that asks for the same, behind the items of `earlier`; checked as far as this is."""
        functions = [
            {**{k: v for k, v in tool.items() if k != "type"}, "name": shown_name(tool["name"], namespace)}
            for namespace, tool in self._functions()
        ]
        return ChatRequest.model_construct(
            **{name: getattr(self, name) for name in OpenAIRequest.model_fields},
            messages=as_messages([*earlier, *self.items], self.instructions),
            max_tokens=self.max_output_tokens,
            tools=[{"type": "function", "function": function} for function in functions] or None,
            tool_choice=_chats_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            logprobs=LOGPROBS in self.include,
            top_logprobs=self.top_logprobs,
            response_format=self._response_format(),
            reasoning_effort=self.reasoning.get("effort"),
            truncation=self.truncation,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def _functions(self) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """With the namespace that they are in."""
        for tool in self.tools or ():
            if tool["type"] == "namespace":
                yield from ((tool["name"], inner) for inner in tool["tools"])
            else:
                yield None, tool

    def spaced(self) -> dict[str, tuple[str, str]]:
        """Namespace and name of the functions that are in one, by the names that the model knows them by."""
        return {
            shown_name(tool["name"], namespace): (namespace, tool["name"])
            for namespace, tool in self._functions()
            if namespace
        }

    def _response_format(self) -> dict[str, Any]:
        kind = self.text.format["type"]
        if kind != "json_schema":
            return {"type": kind}
        return {"type": kind, "json_schema": {"schema": self.text.format["schema"]}}

    def settings(self) -> dict[str, Any]:
        """What a response repeats of its request."""
        unsaid: dict[str, dict[str, Any]] = {
            "function": {"parameters": None, "strict": None},
            "namespace": {"description": ""},
        }
        tools = [{**unsaid[tool["type"]], **tool} for tool in self.tools or ()]
        return {
            **{name: getattr(self, name) for name in REPEATED},
            "background": False,
            "reasoning": {"effort": None, "summary": None, **self.reasoning},
            "text": self.text.model_dump(exclude_none=True),
            "tools": tools,
        }


class InputTokensRequest(ResponseRequest):
    """`POST /v1/responses/input_tokens`: a response whose prompt is only counted."""

    input: str | list[Any] = Field(default_factory=list)

    def chat(self, earlier: Sequence[Item]) -> ChatRequest:
        if not (self.items or earlier or self.instructions):
            raise OptionError("there is nothing to count; give input, instructions or previous_response_id")
        return super().chat(earlier)


def _chats_choice(choice: Any) -> Any:
    """A `tool_choice` as chats have it."""
    if not isinstance(choice, dict):
        return choice
    if choice["type"] != ALLOWED:
        return _function(choice)
    tools = choice.get("tools")
    listed = [_function(tool) for tool in tools] if isinstance(tools, list) else tools
    return {"type": ALLOWED, ALLOWED: {"mode": choice.get("mode"), "tools": listed}}


def _function(tool: Any) -> dict[str, Any]:
    """A tool that is called by its name."""
    named = tool if isinstance(tool, dict) else {}
    name = named.get("name")
    shown = shown_name(name, named.get("namespace")) if isinstance(name, str) else name
    return {"type": "function", "function": {"name": shown}}


def _check_tool(where: str, tool: Any, *kinds: str) -> None:
    """Of a tool, a function or a namespace of functions. Raises OptionError."""
    kind = tool.get("type") if isinstance(tool, dict) else type(tool).__name__
    if kind not in (kinds or ("function", "namespace")):
        raise OptionError(
            f"{where} is of type {kind!r}, which nobody can call here; leave it out, or give a function"
        )
    if not isinstance(tool.get("name"), str):
        raise OptionError(f"{where} has no name; give it beside type")
    if not isinstance(tool.get("parameters") or {}, dict):
        raise OptionError(f"{where}.parameters is not an object; give a JSON schema")
    if kind == "namespace":
        if not isinstance(tool.get("tools"), list):
            raise OptionError(f"{where} has no tools; give a list of functions")
        for index, inner in enumerate(tool["tools"]):
            _check_tool(f"{where}.tools[{index}]", inner, "function")
