"""The states of linear attention, state-space and convolution layers, in slabs with a row per sequence.

Such a layer keeps a state of fixed size in place of keys and values, and every token overwrites it. So a row
can be continued or reset, but not shortened, and a forward that fails half-way leaves it invalid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

States = dict[int, torch.Tensor | None]
"""A layer's states by number, since it may have several: [R, ...], or None if it has none of this kind."""


class StateStore:
    """The memory of one layer, for R rows. Owns its tensors."""

    window = None
    indexer = None

    def __init__(self, probed: Any, rows: int) -> None:
        """`probed`: a LinearAttentionLayer that holds the state after a token of one sequence."""
        self._probed = probed
        self._convolution = _rows_of(probed.conv_states, rows)
        self._recurrent = _rows_of(probed.recurrent_states, rows)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All state tensors, each of shape [R, ...]."""
        for states in (self._convolution, self._recurrent):
            yield from (state for state in states.values() if state is not None)

    def view(self, first: int, count: int, *, begun: bool) -> Any:
        """`count` rows from `first` on as a cache layer of transformers. `begun`: whether they hold states of
        earlier tokens."""
        probed = self._probed
        layer = LinearAttentionLayer(number_of_states=probed.number_of_states)
        layer.dtype, layer.device = probed.dtype, probed.device
        for number in range(probed.number_of_states):
            convolution, recurrent = self._convolution[number], self._recurrent[number]
            if convolution is not None:
                layer.conv_states[number] = convolution.narrow(0, first, count)
                layer.is_conv_states_initialized[number] = True
                layer.conv_kernel_size[number] = probed.conv_kernel_size[number]
            if recurrent is not None:
                layer.recurrent_states[number] = recurrent.narrow(0, first, count)
                layer.is_recurrent_states_initialized[number] = True
            layer.has_previous_state[number] = begun
        return layer


def _rows_of(states: States, rows: int) -> States:
    return {
        number: None if state is None else state.new_zeros((rows, *state.shape[1:]))
        for number, state in states.items()
    }
