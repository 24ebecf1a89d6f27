"""Conversations and tools as OpenAI's API has them, checked before a chat template sees them.

Templates are programs that take much for granted: what they are not made for they skip, or fail at with words
about something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.cache.errors import OptionError, shown

Message = Mapping[str, Any]

TOOL = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'
CALL = '{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}'


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, each with its content as one text, which is what templates of text models know.

    The content is None where a message has calls alone. Raises OptionError for pictures and the like.
    """
    return [_as_text(index, message) for index, message in enumerate(messages)]


def check_tools(tools: object) -> list[dict[str, Any]] | None:
    """The tools; None if there are none. Raises OptionError for what is no list of functions."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise OptionError(f"tools is {shown(tools)}; give a list of {TOOL}")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise OptionError(f"tools[{index}] is {shown(tool)}; tools are functions here, as {TOOL}")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise OptionError(f"the function of tools[{index}] has no name; give it one, as text")
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise OptionError(
                f"the parameters of tools[{index}] are {shown(function['parameters'])}; give a JSON schema, "
                'such as {"type": "object", "properties": {}}'
            )
    return [{"type": "function", **tool} for tool in tools] or None


def check_knows_tools(tokenizer: Any, tools: list[dict[str, Any]]) -> None:
    """Raises OptionError where the chat template would leave them out, so that the model never hears of
    them."""
    try:
        template = tokenizer.get_chat_template(None, tools)
    except ValueError:  # of several none is the default, which encoding the conversation will say
        return
    if "tools" not in template:
        raise OptionError(
            "this model knows no tools: its chat template has no place for them; leave them out, or load it "
            "with another chat template"
        )


def check_text(text: str, where: str) -> None:
    """Raises OptionError for what cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{where} has half a character, at {error.start}; give whole ones") from error


def part_text(where: str, part: object) -> str:
    """Of one part of a message's content. Raises OptionError for pictures and the like."""
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    # a refusal is text that only is called otherwise
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
    if isinstance(text, str):
        return text
    raise OptionError(f"{where} has a part of type {kind!r} without text; this model takes text only")


def _as_text(index: int, message: Message) -> dict[str, Any]:
    where = f"message {index}"
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str):
        raise OptionError(f"{where} has no role; give one, such as user")
    if content is None:
        content = message.get("refusal")
    if isinstance(content, list | tuple):
        content = "".join(part_text(where, part) for part in content)
    if isinstance(content, str):
        check_text(content, where)
    elif content is not None:
        raise OptionError(f"the content of {where} is {shown(content)}; give text")
    elif not calls:
        raise OptionError(f"{where} has no content; give text")
    rest = {name: value for name, value in message.items() if name not in ("tool_calls", "refusal")}
    # Templates ask whether there are calls, not whether the list has any.
    called = {"tool_calls": _check_calls(where, calls)} if calls not in (None, []) else {}
    return {**rest, "role": "system" if role == "developer" else role, "content": content, **called}


def _check_calls(where: str, calls: Any) -> list[Any]:
    """Tool calls of an earlier answer. Raises OptionError for what are none."""
    if not isinstance(calls, list | tuple):
        raise OptionError(f"the tool_calls of {where} are {shown(calls)}; give a list of {CALL}")
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise OptionError(f"{where} has the tool call {shown(call)}; give calls as {CALL}")
        if not isinstance(function.get("arguments", ""), str | Mapping | None):
            raise OptionError(
                f"a call in {where} has the arguments {shown(function['arguments'])}; give an object, or "
                "its JSON"
            )
    return list(calls)
