"""Which expert is in which slot, as tables on the device that kernels read and write and the host fills."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch

from moe_local.cache.expert_cache import ExpertCache
from moe_local.offload.kernels.fetch import LOG_HEAD, LayerTables
from moe_local.offload.kernels.launcher import UNIT
from moe_local.offload.tiers.small_pins import pinned_for
from moe_local.offload.tiers.staging import Slots

NOBODY = -1


class DeviceTables:
    """The tables of all layers in one piece of device memory, whose addresses never change.

    Kernels are given views of it; `triton_fetch` describes their contents. The host fills all of it when the
    device takes custody (`fill`), and sends the lists of slots to fill next after each token (`send`). Both
    are asynchronous copies from pinned memory, in stream order; they only block if the system refused to pin
    that memory.
    """

    def __init__(
        self,
        cache: ExpertCache,
        num_experts: Sequence[int],
        top_k: Sequence[int],
        device: torch.device,
    ) -> None:
        """`cache`: the tier's; its number of slots may shrink but never grow."""
        self._cache = cache
        self._layers = range(len(num_experts))
        self._num_experts = tuple(num_experts)
        slots = [cache.slots(layer) for layer in self._layers]
        self.listed = [min(count, 3 * k) for count, k in zip(slots, top_k, strict=True)]
        """How many slots a layer's list has."""
        experts = list(num_experts)
        sizes = [2, *(1 + count for count in self.listed), *experts, *slots, *slots]
        places = [*itertools.accumulate(map(_even, sizes), initial=0)]
        parts = [slice(start, start + size) for start, size in zip(places, sizes, strict=False)]
        layers = len(experts)
        self._order = parts[1 : 1 + layers]
        self._slot_of = parts[1 + layers : 1 + 2 * layers]
        self._expert_in = parts[1 + 2 * layers : 1 + 3 * layers]
        used = parts[1 + 3 * layers :]
        self._lists = slice(self._order[0].start, self._slot_of[0].start)
        log = _even(LOG_HEAD + 2 * max(top_k))
        with torch.inference_mode(False):
            self._state = torch.zeros(places[-1], dtype=torch.int64, device=device)
            self._mirror = pinned_for(device, torch.zeros(places[-1], dtype=torch.int64))
            self.log = torch.zeros(layers, log, dtype=torch.int64, device=device)
            """[layers, numbers of a layer's log, or more]"""
            self._offsets = [torch.zeros(_even(count), dtype=torch.int64, device=device) for count in slots]
            self._sources = [torch.zeros(_even(count), dtype=torch.int64, device=device) for count in experts]
        state = self._state
        self.of = [
            LayerTables(
                state[self._slot_of[at]],
                state[self._expert_in[at]],
                state[used[at]],
                self._offsets[at],
                self._sources[at],
                state[self._order[at]],
                state[parts[0]][:1],
                self.log[at, : LOG_HEAD + 2 * top_k[at]],
            )
            for at in self._layers
        ]

    def place(self, arena: Slots, sources: Sequence[Sequence[int]]) -> None:
        """Set the addresses of slots and of the experts in RAM, once; `sources[layer][expert]` in bytes."""
        for layer in self._layers:
            base = arena.buffer(layer, 0).data_ptr()
            starts = [arena.buffer(layer, slot).data_ptr() - base for slot in range(self._cache.slots(layer))]
            if any(start % UNIT for start in starts):
                raise ValueError(f"slots of layer {layer} are not {UNIT} bytes apart, or multiples of it")
            offsets, found = self._offsets[layer], self._sources[layer]
            offsets[: len(starts)] = torch.tensor([start // UNIT for start in starts], dtype=torch.int64)
            found[: len(sources[layer])] = torch.tensor(sources[layer], dtype=torch.int64)

    def fill(self, lists: Sequence[Sequence[int]]) -> None:
        """Write the whole state of the cache, at token 0. No copy of the mirror may be in flight."""
        self.log.zero_()  # rows of an earlier custody have token numbers, which start again
        numbers = self._mirror.numpy()
        numbers[:] = 0
        for layer in self._layers:
            slot_of, expert_in = numbers[self._slot_of[layer]], numbers[self._expert_in[layer]]
            slot_of[:] = expert_in[:] = NOBODY
            for slot in range(self._cache.slots(layer)):
                expert = self._cache.expert_in(layer, slot)
                if expert is not None:
                    slot_of[expert], expert_in[slot] = slot, expert
            self._write(layer, lists[layer], 0)
        self._state.copy_(self._mirror, non_blocking=True)

    def send(self, lists: Sequence[Sequence[int]], known: Sequence[int], changed: Iterable[int]) -> None:
        """Send the layers `changed` new lists of slots to fill; `known`: the last token that each covers."""
        for layer in changed:
            self._write(layer, lists[layer], known[layer])
        self._state[self._lists].copy_(self._mirror[self._lists], non_blocking=True)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless device and cache agree on each expert's slot. Waits for the device."""
        numbers = self._state.tolist()
        for layer in self._layers:
            slots = range(self._cache.slots(layer))
            want = [self._cache.expert_in(layer, slot) for slot in slots]
            found = numbers[self._expert_in[layer]][: len(slots)]
            if found != [NOBODY if expert is None else expert for expert in want]:
                raise RuntimeError(f"layer {layer} has {want} in its slots, the device thinks {found}")
            place = [self._cache.slot_of(layer, expert) for expert in range(self._num_experts[layer])]
            there = numbers[self._slot_of[layer]]
            if there != [NOBODY if slot is None else slot for slot in place]:
                raise RuntimeError(f"layer {layer} has its experts in {place}, the device thinks {there}")

    def _write(self, layer: int, slots: Sequence[int], known: int) -> None:
        row = self._mirror.numpy()[self._order[layer]]
        row[0] = known
        row[1 : 1 + len(slots)] = slots
        row[1 + len(slots) :] = NOBODY


def _even(count: int) -> int:
    """Round a count of 8-byte numbers up, so that the next table starts at a multiple of 16 bytes."""
    return count + count % 2
