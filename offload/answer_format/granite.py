"""Tool calls as Granite 3 writes them."""

from __future__ import annotations

from moe_local.offload.answer_format.mistral import Mistral


class Granite(Mistral):
    """`<|tool_call|>[{"name": "f", "arguments": {"p": "value"}}]`, like Mistral's list but for the mark."""

    opening = "<|tool_call|>"
    inner = ()
    list_opening = "["

    def __init__(self) -> None:
        super().__init__(listed=True)
