"""Single tokens bypass the store if every expert has a permanent slot."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from moe_local.offload.gpu.capturing import alone
from moe_local.offload.kernels.contracts import ExpertMath
from moe_local.offload.kernels.cpu_table import CpuTable
from moe_local.offload.kernels.grouped import DTYPES, GroupedRun
from moe_local.offload.kernels.launcher import UNIT, Launcher
from moe_local.offload.kernels.layer import LayerKernels
from moe_local.offload.store.store import ExpertStore

FEW_TOKENS = 16
"""Up to so many tokens on the CPU, the time that the store would take is worth saving."""


def can_reside(store: ExpertStore) -> bool:
    """Whether Residents can serve this store: every expert is in a slot."""
    tier, layers = store.tier, range(len(store.layouts))
    return all(tier.cache.has_all(layer, range(store.num_experts(layer))) for layer in layers)


class ResidentLayer:
    """A device table of one layer's slots by expert, and counters of how often each expert was chosen.

    With several layouts there is one launch per layout, each with a table of all experts that the token
    needs: entries of other layouts are marked as having no place, and their programs end at once.
    """

    def __init__(
        self,
        launcher: Launcher,
        slots: torch.Tensor,
        counts: torch.Tensor,
        others: Sequence[Launcher] = (),
        kinds: torch.Tensor | None = None,
    ) -> None:
        """`slots` int64 [E]: the offset of each expert, in UNITs from the layer's first slot. `counts` int64
        [E], a view: how many tokens chose each. With `others`, `kinds` int64 [E]: the index of each expert's
        launcher, 0 for the first."""
        self._launchers = (launcher, *others)
        self._kinds = kinds
        self._slots = slots
        self._counts = counts
        self._ranks = self._ones = slots[:0]
        self._table = torch.stack([self._ranks, self._ranks], dim=1)
        """The table that a Launcher takes, [K, 2]; its ranks never change."""

    def run(
        self, base: torch.Tensor, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """x [1, D], index and weights [1, K] -> [1, D]. Launches kernels, nothing else.

        `base`: the layer's first slot, uint8. No reference is kept, since an arena may have to free memory.
        """
        ids = index.flatten()
        if len(self._ranks) != len(ids):
            with torch.inference_mode(False):
                self._ranks = torch.arange(len(ids), device=x.device)
                self._ones = torch.ones_like(self._ranks)
                self._table = torch.stack([self._ranks, self._ranks], dim=1)
        self._counts.index_add_(0, ids, self._ones)
        first = GroupedRun(self._launchers[0], x, weights)
        slots = torch.index_select(self._slots, 0, ids, out=self._table[:, 0])
        if self._kinds is None:
            first.launch(base, self._table)
            return first.result()
        kinds = self._kinds.index_select(0, ids)
        for number, launcher in enumerate(self._launchers):
            run = GroupedRun(launcher, x, weights, first.outputs) if number else first
            run.launch(base, torch.stack([slots, torch.where(kinds == number, self._ranks, -1)], dim=1))
        return first.result()


class Residents:
    """Serves single tokens of a store's layers, on the CPU also few at once, without leases, as long as every
    expert has a slot.

    On a device the host then need not know the router's choice; on the CPU the library looks the experts up.
    The results have the same bits as the store's.

    It also counts what the store would have counted: hits at once; the router's choices in a tensor where the
    layer's slots are, from where the RouterLoad fetches them when it is asked.
    """

    def __init__(self, store: ExpertStore, kernels: LayerKernels) -> None:
        self._store = store
        self._kernels = kernels
        self._layers: dict[int, ResidentLayer | CpuTable | None] = {}
        self._used: dict[int, int] = {}
        on: dict[torch.device, list[int]] = {}
        for number in range(len(store.layouts)):
            on.setdefault(store.tier.arena.buffer(number, 0).device, []).append(number)
        self._counts: list[tuple[list[int], torch.Tensor]] = []
        """For each device, its layers and how often each of their experts was chosen."""
        self._counts_of: dict[int, torch.Tensor] = {}
        self._settled: list[list[int]] = []
        """The part of these counts that the RouterLoad already has, in the same order."""
        self._settling = threading.Lock()
        for device, numbers in on.items():
            sizes = [store.num_experts(number) for number in numbers]
            with torch.inference_mode(False):
                counts = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
            self._counts.append((numbers, counts))
            self._settled.append([0] * len(counts))
            self._counts_of |= zip(numbers, counts.split(sizes), strict=True)
        self._emptied = store.tier.emptied
        store.routed.settle = self.settle

    def layer(self, number: int, math: ExpertMath, x: torch.Tensor, tokens: int) -> object | None:
        """What serves `tokens` tokens x [T, D] in a layer; None if the store has to."""
        if not 0 < tokens <= FEW_TOKENS or x.dtype not in DTYPES:
            return None
        if torch.is_autocast_enabled(x.device.type) or not self.serves(number):
            return None
        if number not in self._layers:
            self._layers[number] = self._make(number, math, x)
        layer = self._layers[number]
        return layer if tokens == 1 or isinstance(layer, CpuTable) else None

    def serves(self, number: int) -> bool:
        """Whether every expert of the layer is still in the slot where it was."""
        store = self._store
        return store.tier.emptied == self._emptied and store.slots(number) >= store.num_experts(number)

    def run(self, number: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Tokens x [T, D] through a layer that `layer` returned, index and weights [T, K] -> [T, D]."""
        layer = self._layers[number]
        assert layer is not None
        if isinstance(layer, CpuTable):
            return layer.run(x, index, weights)
        return layer.run(self._store.tier.arena.buffer(number, 0), x, index, weights)

    def _make(self, number: int, math: ExpertMath, x: torch.Tensor) -> ResidentLayer | CpuTable | None:
        on_cpu = self._store.tier.device_of(number) is None
        return self._table(number, math, x) if on_cpu else self._on_device(number, math)

    def _table(self, number: int, math: ExpertMath, x: torch.Tensor) -> CpuTable | None:
        """None for experts of several layouts, which the store serves."""
        store, kinds = self._store, self._store.kinds[number]
        if len(kinds) > 1:
            return None
        slots = [store.tier.cache.slot_of(number, expert) for expert in range(store.num_experts(number))]
        buffers = [store.tier.arena.buffer(number, slot) for slot in slots if slot is not None]
        assert len(buffers) == len(slots)
        return self._kernels.table(math, x, buffers, kinds[0], self._counts_of[number])

    def _on_device(self, number: int, math: ExpertMath) -> ResidentLayer | None:
        store, arena = self._store, self._store.tier.arena
        layouts, base = store.layouts[number], arena.buffer(number, 0)
        found = [self._kernels.grouped.launcher(math, base.device, layout) for layout in store.kinds[number]]
        launchers = [launcher for launcher in found if launcher is not None]
        if len(launchers) < len(found):
            return None
        starts = []
        for expert in range(len(layouts)):
            slot = store.tier.cache.slot_of(number, expert)
            assert slot is not None
            start, odd = divmod(arena.buffer(number, slot).data_ptr() - base.data_ptr(), UNIT)
            assert odd == 0
            starts.append(start)
        with torch.inference_mode(False):
            slots = torch.tensor(starts, dtype=torch.int64, device=base.device)
            kinds = None
            if len(launchers) > 1:
                order = {id(layout): kind for kind, layout in enumerate(store.kinds[number])}
                kinds = torch.tensor([order[id(layout)] for layout in layouts], device=base.device)
        return ResidentLayer(launchers[0], slots, self._counts_of[number], launchers[1:], kinds)

    def count(self, number: int, used: int | None = None) -> None:
        """Count a step that used so many different experts of the layer; None: as many as the one before."""
        if used is not None:
            self._used[number] = used
        self._store.tier.cache.stats.hits_by_layer[number] += self._used[number]

    def settle(self) -> None:
        """Add the counted choices of the router to the store's RouterLoad. Waits for the device."""
        with self._settling:
            for place, (numbers, kept) in enumerate(self._counts):
                with alone, torch.inference_mode():
                    found = kept.clone()
                counts: list[int] = found.tolist()
                before, self._settled[place] = self._settled[place], counts
                new = [count - known for count, known in zip(counts, before, strict=True)]
                start = 0
                for number in numbers:
                    size = self._store.num_experts(number)
                    self._store.routed.add(number, new[start : start + size])
                    start += size
