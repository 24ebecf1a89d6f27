"""The items of a conversation on `/v1/responses`, and the messages of a chat that they amount to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_local.cache.errors import OptionError
from moe_local.offload.engine.conversation import part_text

Item = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")


def as_items(given: str | list[Item]) -> list[Item]:
    """`input` as a list."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def shown_name(name: str, namespace: Any = None) -> str:
    """What the model knows a function by: templates have no place for namespaces."""
    return f"{namespace}__{name}" if namespace else name


def as_messages(items: Sequence[Item], instructions: str | None = None) -> list[dict[str, Any]]:
    """A chat's messages. What the model said between two others is one: its thought, its text, its calls.

    `instructions` and the system's or developer's messages that follow them are one, too, since many
    templates know a system prompt at the start only. Raises OptionError for items that are none, or that no
    model here could be shown.
    """
    messages: list[dict[str, Any]] = []
    system = [instructions] if instructions else []
    for index, item in enumerate(items):
        _add(messages, system, f"input[{index}]", item)
    return [{"role": "system", "content": "\n\n".join(system)}, *messages] if system else messages


def _add(messages: list[dict[str, Any]], system: list[str], where: str, item: Item) -> None:
    if not isinstance(item, dict):
        raise OptionError(f"{where} is {type(item).__name__}; give an object with role and content, or type")
    match item.get("type", "message"):
        case "message":
            _add_message(messages, system, where, item)
        case "reasoning":
            thought = _text(f"{where}.content", item.get("content") or "")
            if thought:
                _said(messages, "reasoning_content", "content", "tool_calls")["reasoning_content"] = thought
        case "function_call":
            name = shown_name(string_of(where, item, "name"), item.get("namespace"))
            function = {"name": name, "arguments": string_of(where, item, "arguments")}
            call = {"id": string_of(where, item, "call_id"), "type": "function", "function": function}
            _said(messages).setdefault("tool_calls", []).append(call)
        case "function_call_output":
            name, output = string_of(where, item, "call_id"), _text(f"{where}.output", item.get("output"))
            messages.append({"role": "tool", "tool_call_id": name, "content": output})
        case "item_reference":
            raise OptionError(f"{where} refers to an item; give the item itself, or previous_response_id")
        case kind:
            raise OptionError(
                f"{where} is of type {kind!r}; message, function_call, function_call_output and reasoning "
                "are understood"
            )


def _add_message(messages: list[dict[str, Any]], system: list[str], where: str, item: Item) -> None:
    role, content = item.get("role"), _text(f"{where}.content", item.get("content"))
    if role not in ROLES:
        raise OptionError(f"{where} has the role {role!r}; there are {', '.join(ROLES)}")
    if role == "assistant":
        _said(messages, "content", "tool_calls")["content"] = content
        return
    role = "system" if role == "developer" else role
    if role == "system" and not messages:
        system.append(content)
    else:
        messages.append({"role": role, "content": content})


def _said(messages: list[dict[str, Any]], *absent: str) -> dict[str, Any]:
    """The model's last message if nothing followed it and it has none of `absent` yet, else a new one."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or any(last.get(name) for name in absent):
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    return last


def _text(where: str, content: Any) -> str:
    if isinstance(content, list):
        return "".join(part_text(where, part) for part in content)
    if not isinstance(content, str):
        raise OptionError(f"{where} is {type(content).__name__}; give text, or a list of its parts")
    return content


def string_of(where: str, item: Item, name: str) -> str:
    """A text that an item must have. Raises OptionError."""
    value = item.get(name)
    if not isinstance(value, str):
        raise OptionError(f"{where} has no {name}; give one, as text")
    return value
