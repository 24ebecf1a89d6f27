"""The items that a stored response was made from, in OpenAI's full form, page by page."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from moe_local.cache.errors import OptionError
from moe_local.cli.server.items import Item

PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def named(item: Item) -> Item:
    """The item with an id; clients need not give one."""
    if isinstance(item.get("id"), str):
        return item
    return {**item, "id": f"{PREFIXES[item.get('type', 'message')]}_{uuid.uuid4().hex[:24]}"}


def listing(items: Sequence[Item], *, after: str | None, limit: int, newest_first: bool) -> dict[str, Any]:
    """`limit` items behind the one with the id `after`; None: from the first on.

    `items`: with ids, oldest first. Raises OptionError if none has the id.
    """
    listed = list(reversed(items)) if newest_first else list(items)
    if after is not None:
        found = next((at for at, item in enumerate(listed) if item["id"] == after), None)
        if found is None:
            raise OptionError(f"after is {after!r}, which is none of the response's input items")
        listed = listed[found + 1 :]
    shown = [_written(item) for item in listed[:limit]]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(listed) > limit,
    }


def _written(item: Item) -> Item:
    """With all fields that OpenAI's clients expect, where the one who sent it left some out."""
    kind = item.get("type", "message")
    if kind == "reasoning":
        return {"summary": [], **item}
    whole = {"status": "completed", **item, "type": kind}
    if kind == "message" and isinstance(item["content"], str):
        said = item["role"] == "assistant"
        part = {"type": "output_text", "annotations": []} if said else {"type": "input_text"}
        whole["content"] = [{**part, "text": item["content"]}]
    return whole
