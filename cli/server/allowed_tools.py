"""OpenAI's `allowed_tools`: a `tool_choice` that leaves the model some of a request's tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.cache.errors import OptionError

ALLOWED = "allowed_tools"


def allow(choice: Any, tools: Sequence[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """How free the model is to call tools, and which, in their order.

    `choice`: a chat's `tool_choice`, {"type": "allowed_tools", "allowed_tools": {"mode", "tools"}} or any
    other, which leaves all of them. Raises OptionError for a mode or a tool that there is not.
    """
    if not isinstance(choice, Mapping) or choice.get("type") != ALLOWED:
        return choice, list(tools)
    given = choice.get(ALLOWED)
    mode, listed = (given.get("mode"), given.get("tools")) if isinstance(given, Mapping) else (None, None)
    if mode not in ("auto", "required"):
        raise OptionError(f"the mode of tool_choice's allowed_tools is {mode!r}; auto and required are known")
    if not isinstance(listed, list):
        raise OptionError(
            "tool_choice's allowed_tools have no tools; give a list of functions by their names"
        )
    known = [_name(tool) for tool in tools]
    names = [_name(tool) for tool in listed]
    for name in names:
        if name is None or name not in known:
            there = ", ".join(name for name in known if name is not None)
            raise OptionError(f"tool_choice allows {name!r}; the tools are {there or 'none'}")
    return mode, [tool for tool, name in zip(tools, known, strict=True) if name in names]


def _name(tool: Any) -> str | None:
    """Of a function as chats have them; None for what is none."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None
