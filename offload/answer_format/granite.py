"""Tool calls as Granite 3 writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_local.offload.answer_format.hermes import parse_call
from moe_local.offload.answer_format.mistral import Mistral


class Granite(Mistral):
    """`<|tool_call|>[{"name": "f", "arguments": {"p": "value"}}]`, like Mistral's list but for the mark."""

    opening = "<|tool_call|>"
    inner = ()
    list_opening = "["

    def __init__(self) -> None:
        super().__init__(listed=True)

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        said = [call for given in calls if (call := parse_call(given["function"]))]
        listed = [f'{{"name": {json.dumps(c["name"])}, "arguments": {c["arguments"] or "{}"}}}' for c in said]
        return f"{self.opening}[{', '.join(listed)}]"
