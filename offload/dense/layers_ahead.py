"""What decoder layers gave that were computed before they were called."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_local.offload.dense.layer_part import Part
from moe_local.offload.dense.places import cache_of
from moe_local.offload.dense.token_state_call import overwrites_states, states_of


@dataclass(slots=True)
class Ahead:
    """Layers' outputs, and with what they were computed. Keeps neither a cache nor masks alive.

    Keys and values are in their places already, where a layer that is computed again writes them once more. A
    state stays as it was until its layer is called.
    """

    parts: list[Part]
    angles: Any
    """The first layer's `position_embeddings`."""
    cache: weakref.ref[Any]
    masks: list[weakref.ref[torch.Tensor] | None]
    """For each layer, the mask that it was expected to get, from which its span was found."""
    spans: list[tuple[Any, ...]]
    """For each layer, the `span` of its places."""
    tokens: int
    """n"""
    outputs: Sequence[torch.Tensor]
    """For each layer, [n, 1, D]."""
    ids: ctypes.Array[ctypes.c_int64]
    """The experts that each layer's tokens chose, [n, top_k], one layer after the other. The library has
    counted them."""
    left: torch.Tensor | None
    """What is to become of the layers' states, float32 [n, `left`] of each that has any, one after the other.
    None if they were changed at once."""
    number: int = 0
    """The layer whose call is the next one."""
    start: int = 0
    """Where its ids begin."""
    left_start: int = 0
    """Where in `left` it begins."""

    def goes_on(self, modules: Sequence[Any], number: int, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether layer `number` of these is called as was expected when it was computed."""
        if number != self.number or x is not self.outputs[number - 1] or x._version:
            return False
        if kwargs.get("position_embeddings") is not self.angles or cache_of(kwargs) is not self.cache():
            return False
        if self.parts[number].net is not None:
            states = states_of(kwargs, self.parts[number].layer_idx) if overwrites_states(kwargs) else None
            return states is not None and states.span == self.spans[number]
        mask, expected = kwargs.get("attention_mask"), self.masks[number]
        if mask is None if expected is None else mask is not None and mask is expected():
            return True
        module = modules[number]
        places = module._token_layer.places(module, x, kwargs)
        return places is not None and places.span == self.spans[number]

    def take(self) -> torch.Tensor:
        """The next layer's output, whose pass is counted, and whose states are changed."""
        number, start = self.number, self.start
        part = self.parts[number]
        if part.net is not None and self.left is not None:
            inputs, states, *_ = self.spans[number]
            part.net.change(self.left[self.left_start :].data_ptr(), self.tokens, inputs, states)
            self.left_start += self.tokens * part.left
        self.number, self.start = number + 1, start + self.tokens * part.top_k
        part.experts.count(part.top_k if self.tokens == 1 else len(set(self.ids[start : self.start])))
        return self.outputs[number]

    def give_up(self) -> None:
        """Take back what the library has counted for layers that were not called."""
        while self.number < len(self.outputs):
            part, start = self.parts[self.number], self.start
            self.number, self.start = self.number + 1, start + self.tokens * part.top_k
            chosen = (ctypes.c_int64 * part.struct.count).from_address(part.struct.chosen)
            for expert in self.ids[start : self.start]:
                chosen[expert] -= 1
