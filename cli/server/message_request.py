"""What clients send to `/v1/messages`, Anthropic's interface, and the chat that it amounts to.

As in protocol.py, types are taken at their word, and what cannot be honoured is refused by name.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, field_validator

from moe_local.cache.errors import OptionError
from moe_local.cli.server.blocks import as_items, system_text
from moe_local.cli.server.items import as_messages
from moe_local.cli.server.protocol import ChatRequest, Drawing
from moe_local.offload.answer_format.template_needs import SWITCHES

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""OpenAI's words for how free the model is to call tools."""
THOUGHTS = {
    "enabled": dict.fromkeys(SWITCHES, True),
    "disabled": dict.fromkeys(SWITCHES, False),
    "adaptive": {},
    "between_tools": {},
}
"""Variables of chat templates."""


class CountRequest(Drawing):
    """`POST /v1/messages/count_tokens`: a conversation. See refusals.check_fields for unknown fields."""

    model_config = ConfigDict(extra="allow")

    messages: list[Any] = Field(min_length=1)
    system: str | list[Any] = ""
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: dict[str, Any] = Field(default_factory=lambda: {"type": "auto"})
    thinking: dict[str, Any] = Field(default_factory=lambda: {"type": "adaptive"})
    """A budget is none here: a thought is as long as the model makes it."""
    output_config: dict[str, Any] = Field(default_factory=dict)
    max_tokens: int | None = None
    stop_sequences: list[str] = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    # What changes nothing here: all that is computed is kept for who asks next, as long as there is room.
    cache_control: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    metadata: Any = None
    service_tier: Any = None
    speed: Any = None
    user_profile_id: Any = None

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[Any]) -> list[Any]:
        as_items(messages)
        return messages

    @field_validator("system")
    @classmethod
    def _check_system(cls, system: str | list[Any]) -> str:
        return system_text(system)

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those alone that a client defines. Others are Anthropic's own, which the model does without; but
        where there is nothing else, they are what the request is about."""
        own = [(index, tool) for index, tool in enumerate(tools) if tool.get("type") in (None, "custom")]
        if tools and not own:
            raise OptionError(
                f"tools[0] is of type {tools[0]['type']!r}, which Anthropic defines or runs; give tools with "
                "a name and an input_schema"
            )
        for index, tool in own:
            if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), dict):
                raise OptionError(f"tools[{index}] has no name or no input_schema; give a text and a schema")
        return [tool for _, tool in own]

    @field_validator("tool_choice")
    @classmethod
    def _check_tool_choice(cls, choice: dict[str, Any]) -> dict[str, Any]:
        if choice.get("type") not in (*CHOICES, "tool"):
            raise OptionError(
                f"tool_choice of type {choice.get('type')!r} is not supported; auto, any, tool and none are"
            )
        return choice

    @field_validator("thinking")
    @classmethod
    def _check_thinking(cls, thinking: dict[str, Any]) -> dict[str, Any]:
        if thinking.get("type") not in list(THOUGHTS):
            raise OptionError(
                f"thinking of type {thinking.get('type')!r} is not supported; {', '.join(THOUGHTS)} are"
            )
        return thinking

    @field_validator("output_config")
    @classmethod
    def _check_output_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(config.get("effort"), str | None):
            raise OptionError(f"output_config.effort is {config['effort']!r}; give a word, such as low")
        form = config.get("format")
        known = isinstance(form, dict) and form.get("type") == "json_schema"
        if form is not None and not (known and isinstance(form.get("schema"), dict)):
            raise OptionError(
                "output_config.format is no json_schema with its schema; nothing else is supported"
            )
        return config

    def chat(self) -> ChatRequest:
        """The chat that asks for the same; checked as far as this is."""
        choice: str | dict[str, Any] = CHOICES.get(self.tool_choice["type"], "")
        if not choice:
            choice = {"type": "function", "function": {"name": self.tool_choice.get("name")}}
        form = self.output_config.get("format")
        return ChatRequest.model_construct(
            **{name: getattr(self, name) for name in Drawing.model_fields},
            stop=self.stop_sequences,
            messages=as_messages(as_items(self.messages), str(self.system)),
            max_tokens=self.max_tokens,
            tools=[_function(tool) for tool in self.tools] or None,
            tool_choice=choice,
            parallel_tool_calls=not self.tool_choice.get("disable_parallel_tool_use"),
            response_format=form and {"type": "json_schema", "json_schema": form},
            reasoning_effort=self.output_config.get("effort"),
            chat_template_kwargs={**THOUGHTS[self.thinking["type"]], **self.chat_template_kwargs},
        )


class MessageRequest(CountRequest):
    """`POST /v1/messages`: what is to be answered, which must have a limit."""

    max_tokens: int


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as chat templates know them."""
    described = {"description": tool["description"]} if tool.get("description") else {}
    function = {"name": tool["name"], **described, "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}
