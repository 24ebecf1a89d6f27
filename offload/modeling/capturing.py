"""Transformers' hooks that collect hidden states, attentions and router logits for who asks for them.

A first call with `output_hidden_states` and the like leaves them on the modules for good; but while no such
call is under way, they do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils import output_capturing

_HOOK = "output_capturing_hook"


def all_asleep(hooks: Iterable[Mapping[int, Any]]) -> bool:
    """Whether all these hooks of modules are transformers' own, and nobody collects anything now."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or collector.get():  # a dict by kind of output, of which calls mostly want none
        return False
    return all(
        getattr(hook, "__name__", "") == _HOOK and hook.__module__ == output_capturing.__name__
        for some in hooks
        for hook in some.values()
    )
