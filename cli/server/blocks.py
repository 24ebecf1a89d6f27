"""The messages of `/v1/messages`, blocks and all, as items; items.py says which chat these amount to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moe_local.cache.errors import OptionError
from moe_local.cli.server.items import Item, string_of
from moe_local.offload.engine.conversation import part_text

ROLES = ("user", "assistant", "system")
BILLING = "x-anthropic-billing-header:"
"""Claude Code begins its system prompt with a block of this, for Anthropic's books and with something else in
each request, so that a model that was shown it would have to read the whole prompt anew each time."""


def as_items(messages: Sequence[Any]) -> list[Item]:
    """What was said in a row by the same role is one item, as Anthropic has it.

    Raises OptionError for messages that are none, or that no model here could be shown.
    """
    items: list[Item] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise OptionError(f"{where} is {type(message).__name__}; give an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise OptionError(f"{where} has the role {role!r}; there are {', '.join(ROLES)}")
        where = f"{where}.content"
        for block in _blocks(where, message.get("content")):
            _add(items, role, where, block)
    return items


def system_text(system: Any) -> str:
    """What the model is shown of `system`. Raises OptionError for what is no text."""
    if isinstance(system, str):
        return system
    texts = [part_text("system", block) for block in _blocks("system", system)]
    return "\n".join(text for text in texts if not text.startswith(BILLING))


def _text(where: str, content: Any) -> str:
    return "\n".join(_shown(where, block) for block in _blocks(where, content))


def _shown(where: str, block: Any) -> str:
    """What the model is shown of a block of text, or of a document that is text."""
    if not isinstance(block, dict) or block.get("type") != "document":
        return part_text(where, block)
    source, citations = block.get("source"), block.get("citations")
    source = source if isinstance(source, dict) else {}
    if isinstance(citations, dict) and citations.get("enabled"):
        raise OptionError(f"{where} has a document with citations, which are not supported; leave them out")
    match source.get("type"):
        case "text":
            text = string_of(f"{where}.source", source, "data")
        case "content":
            inside = f"{where}.source.content"
            text = "\n".join(part_text(inside, part) for part in _blocks(inside, source.get("content")))
        case kind:
            raise OptionError(f"{where} has a document of type {kind!r}; this model takes text only")
    return "\n".join([*(str(block[name]) for name in ("title", "context") if block.get(name)), text])


def _blocks(where: str, content: Any) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise OptionError(f"{where} is {type(content).__name__}; give text, or a list of blocks")
    return content


def _add(items: list[Item], role: str, where: str, block: Any) -> None:
    match block.get("type") if isinstance(block, dict) else None:
        case "thinking":
            items.append({"type": "reasoning", "content": string_of(where, block, "thinking")})
        case "redacted_thinking":
            pass  # no thought of a model that was asked here
        case "tool_use":
            given = block.get("input")
            if not isinstance(given, dict):
                raise OptionError(f"{where} has a tool_use without input; give it, as an object")
            name, called = string_of(where, block, "name"), string_of(where, block, "id")
            arguments = json.dumps(given, ensure_ascii=False)
            items.append({"type": "function_call", "call_id": called, "name": name, "arguments": arguments})
        case "tool_result":
            called = string_of(where, block, "tool_use_id")
            output = _text(f"{where}.content", block.get("content") or "")
            items.append({"type": "function_call_output", "call_id": called, "output": output})
        case _:
            text, last = _shown(where, block), items[-1] if items else {}
            if last.get("role") == role:
                last["content"] += f"\n{text}"
            else:
                items.append({"role": role, "content": text})
