"""The key-value slab for models in which some layers keep a state in place of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from moe_local.offload.engine.kv_slab import KVSlab, empty_layer, slabbed
from moe_local.offload.engine.saved_row import SavedRow
from moe_local.offload.engine.snapshots import Snapshot, Snapshots
from moe_local.offload.engine.state_rows import StateStore


class StateSlab(KVSlab):
    """A KVSlab that also has a StateStore for each layer that keeps a state.

    A state cannot be rolled back, so a row can be cut only to where a snapshot was taken. A failed forward
    leaves the states of its rows invalid, so these rows go back to their last snapshots.
    """

    needs_snapshots = True

    def __init__(self, probe: Any, rows: int, capacity: int, *, whole_prompt_only: bool = False) -> None:
        """`probe` as for a KVSlab; see `can_state_slab`. `whole_prompt_only`: see `forgets_states`."""
        super().__init__(_without_states(probe), rows, capacity)
        self.whole_prompt_only = whole_prompt_only
        self.can_copy = not whole_prompt_only
        with torch.inference_mode(False):
            self.states = {
                index: StateStore(layer, rows) for index, layer in enumerate(probe.layers) if is_state(layer)
            }
            self._slab = [tensor for store in self.states.values() for tensor in store.tensors()]
            self.snapshots = Snapshots(self._slab, rows)

    def join(self) -> int:
        self._begin_anew(len(self.lens))  # first: where it raises, no row is taken
        return super().join()

    def leave(self, row: int) -> None:
        last = len(self.lens) - 1
        self.snapshots.cut(row, 0)
        if row != last:
            self.lens[row] = 0
        for tensor in self._slab:
            tensor[row].copy_(tensor[last])
        super().leave(row)
        self.snapshots.swap(row, last)

    def _swap(self, one: int, other: int) -> None:
        for tensor in self._slab:
            tensor[[one, other]] = tensor[[other, one]]
        super()._swap(one, other)
        self.snapshots.swap(one, other)

    def row(self, row: int) -> Any:
        return self._with_states(super().row(row), row, 1, begun=self.lens[row] > 0)

    def batch(self, count: int) -> Any:
        # a row without tokens has a state of zeros, which equals no state
        return self._with_states(super().batch(count), 0, count, begun=True)

    def static_row(
        self, row: int, columns: int, positions: Mapping[torch.device, torch.Tensor], length: torch.Tensor
    ) -> Any:
        fixed = super().static_row(row, columns, positions, length)
        return self._with_states(fixed, row, 1, begun=True)

    def mark(self, row: int) -> Callable[[], None]:
        """As KVSlab's; copies the row's states to RAM, since VRAM is fully used: 75 MB for Qwen3-Next."""
        states = [tensor[row] for tensor in self._slab]
        kept = [state.to("cpu", copy=True) for state in states]

        def put_back() -> None:
            for state, before in zip(states, kept, strict=True):
                state.copy_(before)

        return put_back

    def abort(self, row: int) -> None:
        super().abort(row)
        self._go_back(row, self.snapshots.longest(row, self.lens[row]))

    def chunk(self, row: int, todo: int, wanted: int) -> int:
        if self.whole_prompt_only:
            return todo if self.lens[row] == 0 else 1
        return super().chunk(row, todo, wanted)

    def snapshot(self, row: int) -> None:
        length = self.lens[row]
        if not self.whole_prompt_only and length > self.snapshots.longest(row, length):
            self.snapshots.take(row, length)

    def reusable(self, row: int, length: int) -> int:
        if length == self.lens[row] and not self.whole_prompt_only:
            return length
        return self.snapshots.longest(row, length)

    def shorten(self, row: int, length: int) -> None:
        assert length == self.reusable(row, length), f"row {row} cannot be cut to {length} tokens"
        if length < self.lens[row]:
            self._go_back(row, length)

    def copy(self, one: int, other: int, length: int) -> None:
        present = length == self.lens[one]
        states = [tensor[one] for tensor in self._slab] if present else self.snapshots.at(one, length)
        try:
            self._set_states(other, states)
            super().copy(one, other, length)
        except BaseException:
            self.abort(other)
            raise

    def saved_bytes(self, row: int) -> int:
        states = sum(tensor[row].nbytes for tensor in self._slab)
        return super().saved_bytes(row) + states * (1 + len(self.snapshots.of(row)))

    def save(self, row: int) -> SavedRow:
        saved = super().save(row)
        kept = [
            Snapshot(each.length, [state.clone() for state in each.states])
            for each in self.snapshots.of(row)
            if each.length < saved.length
        ]
        present = Snapshot(saved.length, [tensor[row].to("cpu", copy=True) for tensor in self._slab])
        return replace(saved, snapshots=[*kept, present])

    def load(self, row: int, saved: SavedRow, length: int) -> None:
        *earlier, last = (each for each in saved.snapshots or () if each.length <= length)
        assert last.length == length
        try:
            self._set_states(row, last.states)
            for each in earlier:
                self.snapshots.put(row, each)
            super().load(row, saved, length)
        except BaseException:
            self._go_back(row, 0)
            raise

    def _set_states(self, row: int, states: Sequence[torch.Tensor]) -> None:
        for tensor, state in zip(self._slab, states, strict=True):
            tensor[row].copy_(state)

    def _go_back(self, row: int, length: int) -> None:
        """To a snapshot, or to the beginning. If that raises, the row is empty."""
        self.lens[row] = 0
        if length == 0:
            self.snapshots.cut(row, 0)
            self._begin_anew(row)
            return
        try:
            self._set_states(row, self.snapshots.at(row, length))
        except BaseException:
            self.snapshots.cut(row, 0)
            raise
        self.snapshots.cut(row, length)
        self.lens[row] = length

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(tensor.nbytes for tensor in self._slab) + self.snapshots.nbytes

    def check_integrity(self) -> None:
        super().check_integrity()
        for index, store in self.states.items():
            assert self.layers[index] is None
            for tensor in store.tensors():
                assert tensor.shape[0] == self.rows, tensor.shape
        self.snapshots.check_integrity(self.lens)

    def _begin_anew(self, row: int) -> None:
        for tensor in self._slab:
            tensor[row].zero_()

    def _with_states(self, columns: Any, first: int, count: int, *, begun: bool) -> Any:
        layers = list(columns.layers)
        for index, store in self.states.items():
            layers[index] = store.view(first, count, begun=begun)
        return Cache(layers=layers)


def is_state(layer: Any) -> bool:
    """Whether a probed cache layer keeps nothing but states."""
    return type(layer) is LinearAttentionLayer


def can_state_slab(probe: Any) -> bool:
    """Whether a StateSlab can hold a probed cache: every layer keeps a state, or each token in its own column
    or nothing, and at least one keeps tokens."""
    kept = [layer for layer in probe.layers if not is_state(layer)]
    return all(map(slabbed, kept)) and any(getattr(layer, "keys", None) is not None for layer in kept)


def _without_states(probe: Any) -> Any:
    """The probe with an empty layer in place of each layer that keeps a state."""
    return Cache(layers=[empty_layer() if is_state(layer) else layer for layer in probe.layers])
