"""Where every expert has a slot for good, a token goes through a layer without the host knowing which."""

from __future__ import annotations

import torch

from moe_local.offload.kernels.contracts import ExpertMath
from moe_local.offload.kernels.grouped import DTYPES, GroupedExperts, GroupedRun
from moe_local.offload.kernels.grouped_nf4 import UNIT, GroupedNF4
from moe_local.offload.store import ExpertStore


class ResidentLayer:
    """The slots of one layer's experts as a table on the device, and how often each was chosen."""

    def __init__(
        self, launcher: GroupedNF4, base: torch.Tensor, slots: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """`base` uint8, where the arena begins; `slots` int64 [E], each expert's start in UNITs from there;
        `counts` int64 [E], a view: how many tokens chose it."""
        self.top_k = 0
        """K of the last token."""
        self._launcher = launcher
        self._base = base
        self._slots = slots
        self._counts = counts
        self._ranks = self._ones = slots[:0]

    def run(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [1, D], index and weights [1, K] -> [1, D]. Launches kernels, nothing else."""
        ids = index.flatten()
        if self.top_k != len(ids):
            self.top_k = len(ids)
            self._ranks = torch.arange(self.top_k, device=x.device)
            self._ones = torch.ones_like(self._ranks)
        self._counts.index_add_(0, ids, self._ones)
        run = GroupedRun(self._launcher, x, weights)
        run.launch(self._base, torch.stack([self._slots.index_select(0, ids), self._ranks], dim=1))
        return run.result()


class Residents:
    """The layers of a store that are served on the device alone. The host-driven way gives the same bits.

    Counts what the store and its RouterLoad would have counted: hits at once, the router's choices on the
    device until they are asked for.
    """

    def __init__(self, store: ExpertStore, grouped: GroupedExperts) -> None:
        """`store` must be `all_resident`, for good."""
        assert store.all_resident
        self._store = store
        self._grouped = grouped
        self._layers: dict[int, ResidentLayer | None] = {}
        device = store.tier.arena.device
        sizes = [store.num_experts(layer) for layer in range(len(store.layouts))]
        with torch.inference_mode(False):
            self._counts = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._counts_of = self._counts.split(sizes)
        store.routed.settle = self.settle

    def layer(self, number: int, math: ExpertMath, x: torch.Tensor, tokens: int) -> ResidentLayer | None:
        """What serves so many tokens x [T, D] of a layer; None where the host has to."""
        if tokens != 1 or x.dtype not in DTYPES or torch.is_autocast_enabled(x.device.type):
            return None
        if number not in self._layers:
            self._layers[number] = self._make(number, math)
        return self._layers[number]

    def _make(self, number: int, math: ExpertMath) -> ResidentLayer | None:
        store, arena = self._store, self._store.tier.arena
        layouts = store.layouts[number]
        launcher = self._grouped.launcher(math, arena.device, layouts[0])
        if launcher is None or any(layout != layouts[0] for layout in layouts):
            return None
        starts = []
        for expert in range(len(layouts)):
            slot = store.tier.cache.slot_of(number, expert)
            assert slot is not None
            start, odd = divmod(arena.offset(number, slot), UNIT)
            assert odd == 0
            starts.append(start)
        with torch.inference_mode(False):
            slots = torch.tensor(starts, dtype=torch.int64, device=arena.device)
        return ResidentLayer(launcher, arena.buffer(0, 0), slots, self._counts_of[number])

    def count(self, number: int) -> None:
        """A token went through the layer."""
        layer = self._layers[number]
        assert layer is not None
        self._store.tier.cache.stats.hits_by_layer[number] += layer.top_k

    def settle(self) -> None:
        """Bring the router's choices to the store's RouterLoad. Waits for the device."""
        with torch.inference_mode():
            counts = self._counts.tolist()
            self._counts.zero_()
        start = 0
        for number, part in enumerate(self._counts_of):
            self._store.routed.add(number, counts[start : start + len(part)])
            start += len(part)
