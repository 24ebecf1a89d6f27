"""Serves the cache misses of single tokens on the device, so that the host never waits within a token.

Kernels look up a token's experts and copy the absent ones from RAM themselves, into slots that the host has
listed beforehand, and write what they did to a log. While the next token is computed the host reads that
log: it counts hits and misses, updates the cache and its policy, and lists the slots to fill next.
"""

from __future__ import annotations

import operator
import threading
import time
from typing import NamedTuple

import numpy as np
import torch

from moe_local.cache.keys import ExpertKey
from moe_local.offload.gpu.device_tables import DeviceTables
from moe_local.offload.kernels.contracts import ExpertMath
from moe_local.offload.kernels.fetch import LOG_HEAD, Fetch, LayerTables
from moe_local.offload.kernels.grouped import DTYPES, GroupedExperts, GroupedRun
from moe_local.offload.kernels.launcher import Launcher
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.system.interrupt import check as check_interrupt
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.copies import CopySource
from moe_local.offload.tiers.device import Event
from moe_local.offload.tiers.small_pins import pinned_for
from moe_local.offload.tiers.staging import StagedArena

WAIT_SECONDS = 0.1
"""Longest wait between two checks for pending interrupts."""

OLD = 16
"""Tokens after which a layer's list of slots is made anew although none of its experts was used: the policy's
order may have changed by then."""


class DeviceLayer(NamedTuple):
    """The launcher and tables that serve one layer's tokens."""

    launcher: Launcher
    tables: LayerTables


class _Log:
    """The device's log of a token, being copied to the host."""

    def __init__(self, token: int, memory: torch.Tensor, event: Event) -> None:
        self.token = token
        self._numbers = memory
        self._event = event
        self.counted = False

    def read(self) -> np.ndarray:
        """int64 [layers, 4 + 2 K or more]. Waits for the device."""
        self._event.synchronize()
        numbers: np.ndarray = self._numbers.numpy()
        return numbers


class DeviceMisses:
    """Has custody of a tier's slots from a token's `begin` until the host takes it back (`release`).

    For a tier on one device above RAM that holds every expert in pinned memory, if the grouped kernels serve
    all layers. Results have the same bits as with the host. Hits may differ, because evictions do: a token's
    list of slots is in the policy's order of one token earlier, without the experts used since.

    Used by the engine's thread alone, except for `settle_counts` and `catch_up`: another thread may call
    these at any time, and does not see the token that is being computed.
    """

    def __init__(self, store: ExpertStore, grouped: GroupedExperts, fetch: Fetch) -> None:
        """For a store that engine/miss_trial's `hindrance` has accepted."""
        assert store.below is not None
        assert isinstance(store.tier.source, CopySource)
        assert isinstance(store.below.arena, StagedArena)
        assert isinstance(store.below.arena.own, HostArena)
        self._store = store
        self._tier = store.tier
        self._copies = store.tier.source
        self._grouped = grouped
        self._fetch = fetch
        self._memory = store.below.arena.own
        (self._device,) = store.tier.devices
        layers = range(len(store.layouts))
        experts = [store.num_experts(layer) for layer in layers]
        self._top_k = [store.routed.top_k(layer) for layer in layers]
        self.tables = DeviceTables(store.tier.cache, experts, self._top_k, self._device.torch_device)
        self.tables.place(store.tier.arena, [self._in_ram(layer) for layer in layers])
        self._layers: dict[int, DeviceLayer] = {}
        shape, place = self.tables.log.shape, self._device.torch_device
        with torch.inference_mode(False):
            self._logs = [pinned_for(place, torch.zeros(shape, dtype=torch.int64)) for _ in range(2)]
        self._nbytes = [store.layouts[layer][0].nbytes for layer in layers]
        self._alike = self._top_k[0] if len(set(self._top_k)) == 1 else None
        """Experts per token, if that is the same in all layers; else None."""
        self._has_custody = False
        self._in_token = False
        self._thread = threading.get_ident()
        """The thread that computes, or computed, the last token."""
        self._lock = threading.RLock()
        """Held while a token begins or ends, and while its log is read."""
        self._token = 0
        """Tokens since the device took over."""
        self._log: _Log | None = None
        """The last token's log, if the cache was not updated from it yet."""
        self._lists: list[list[int]] = [[] for _ in layers]
        self._listed: list[set[int]] = [set() for _ in layers]
        """For each layer, the experts in the slots of its list."""
        self._known = [0 for _ in layers]
        """For each layer, the last token that its list takes into account."""
        self._sent: Event = self._device.record()
        self._not_fetched: int | None = None
        """The layer whose absent experts were given slots, but whose copies could not be launched."""

    # A token

    def begin(self) -> None:
        """Call before a token is launched on the device."""
        with self._lock:
            if self._in_token:  # the token before was not completed
                self.release()
            if not self._has_custody:
                self._take_over()
            self._in_token, self._thread = True, threading.get_ident()

    def end(self) -> None:
        """Call when all of the token was launched. Meanwhile updates the cache from the previous log."""
        with self._lock:
            if not self._in_token:  # the host took custody back within the token
                return
            before, self._log = self._log, self._ship()
            if before is not None:
                self._follow(before)

    def layer(self, number: int, math: ExpertMath, x: torch.Tensor, tokens: int) -> DeviceLayer | None:
        """What serves `tokens` tokens x [T, D] in a layer; None if the host has to."""
        if not self._in_token or tokens != 1:
            return None
        if x.dtype not in DTYPES or torch.is_autocast_enabled(x.device.type):
            return None
        if number not in self._layers:
            layout = self._store.layouts[number][0]
            launcher = self._grouped.launcher(math, x.device, layout)
            if launcher is None:
                return None
            self._layers[number] = DeviceLayer(launcher, self.tables.of[number])
        return self._layers[number]

    def serves(self, number: int) -> bool:
        """Whether a capture of the layer may be replayed: from its first token on, no address changes."""
        return number in self._layers

    def run(self, number: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One token x [1, D] through a layer that `layer` returned, index and weights [1, K] -> [1, D].

        Launches kernels, nothing else.
        """
        layer, base = self._layers[number], self._tier.arena.buffer(number, 0)
        assert index.shape[1] == self._top_k[number]
        run = GroupedRun(layer.launcher, x, weights)  # first, since memory may not suffice for it
        table = self._fetch.look_up(layer.tables, index.flatten(), begins=number == 0)
        self._not_fetched = number
        self._fetch.bring(layer.tables, self._memory.memory.tensor, base, self._nbytes[number])
        self._not_fetched = None
        run.launch(base, table)
        return run.result()

    def count(self, number: int, top_k: int | None = None) -> None:
        """Does nothing: the device's log has the counts."""

    # Custody

    def settle_counts(self) -> None:
        with self._lock:
            if self._log is not None:
                self._count(self._log)

    def catch_up(self) -> None:
        with self._lock:
            if self._in_token and self._thread != threading.get_ident():
                return  # the device has custody, and the other thread may be launching more of the token
            if self._in_token:  # an exception was raised within the token: how far it came is unknown
                self.release()
            elif self._log is not None:
                log, self._log = self._log, None
                self._follow(log)

    def release(self) -> None:
        with self._lock:
            if self._has_custody:
                self.end()
                self.catch_up()
                self._has_custody = False

    def check_integrity(self) -> None:
        self.catch_up()
        if self._has_custody:
            self.tables.check_integrity()

    # Inside

    def _in_ram(self, layer: int) -> list[int]:
        """The offset in RAM of each expert; they never move."""
        assert self._store.below is not None
        cache = self._store.below.cache
        slots = [cache.slot_of(layer, expert) for expert in range(self._store.num_experts(layer))]
        return [self._memory.offset(layer, slot) for slot in slots if slot is not None]

    def _take_over(self) -> None:
        """Wait for loads in flight, then give the device the cache's tables, and custody."""
        tier, cache = self._tier, self._tier.cache
        tier.poll()
        unwanted = cache.staging.clear(-1, ())
        unwanted += [ExpertKey(layer, e) for layer in range(cache.layers) for e in cache.prefetching(layer)]
        for key in dict.fromkeys(unwanted):
            tier.cancel(key)
        while tier.loading:
            start = time.perf_counter()
            tier.source.wait(WAIT_SECONDS)
            self._store.stalls.add_stall("late_prefetch", time.perf_counter() - start)
            check_interrupt()
            tier.poll()
        for layer in range(cache.layers):
            self._list(layer)
            self._known[layer] = 0
        self._sent.synchronize()
        self.tables.fill(self._lists)
        self._sent = self._device.record()
        self._token, self._not_fetched = 0, None
        self._has_custody = True

    def _ship(self) -> _Log:
        """Copy the log to the host behind the token's kernels, which were launched."""
        self._in_token = False
        self._token += 1
        memory = self._logs[self._token % 2]
        memory.copy_(self.tables.log, non_blocking=True)
        return _Log(self._token, memory, self._device.record())

    def _count(self, log: _Log) -> None:
        if log.counted:
            return
        log.counted = True
        rows, head = log.read(), LOG_HEAD
        fills = rows[:, head:] >= 0
        if self._alike is not None:
            missed = fills[:, self._alike :].sum(axis=1)
        else:
            missed = np.array([row[k : 2 * k].sum() for row, k in zip(fills, self._top_k, strict=True)])
        used, waited = self._top_k, rows[:, 2] - rows[:, 1]
        there = rows[:, 0] == log.token
        if not there.all():  # the token was not computed up to these layers
            missed, waited = missed * there, waited * there
            used = [k * came for k, came in zip(used, there.tolist(), strict=True)]
        misses, counters = missed.tolist(), self._tier.cache.stats
        counters.misses_by_layer[:] = map(operator.add, counters.misses_by_layer, misses)
        hits = map(operator.sub, used, misses)
        counters.hits_by_layer[:] = map(operator.add, counters.hits_by_layer, hits)
        self._copies.bytes_copied += sum(map(operator.mul, misses, self._nbytes))
        self._store.stalls.add_stall("demand", 1e-9 * int(waited.sum()))

    def _follow(self, log: _Log) -> None:
        """Count a token, update the cache from its log, and send the device new lists."""
        self._count(log)
        cache, routed = self._tier.cache, self._store.routed
        changed = []
        for layer, row in enumerate(log.read().tolist()):
            if row[0] != log.token:
                continue  # the token was not computed up to this layer
            k = self._top_k[layer]
            experts, filled = row[LOG_HEAD : LOG_HEAD + k], row[LOG_HEAD + k : LOG_HEAD + 2 * k]
            cache.elsewhere.follow(layer, experts, filled)
            if layer == self._not_fetched:
                for expert in (expert for expert, slot in zip(experts, filled, strict=True) if slot >= 0):
                    cache.staging.evict(layer, expert)
            routed.count_all(layer, experts)
            if (
                max(filled) >= 0
                or not self._listed[layer].isdisjoint(experts)
                or log.token - self._known[layer] >= OLD
            ):
                self._list(layer)
                self._known[layer] = log.token
                changed.append(layer)
        if changed:
            self._sent.synchronize()
            self.tables.send(self._lists, self._known, changed)
            self._sent = self._device.record()

    def _list(self, layer: int) -> None:
        cache = self._tier.cache
        slots = cache.elsewhere.next_filled(layer, self.tables.listed[layer])
        self._lists[layer] = slots
        self._listed[layer] = {e for slot in slots if (e := cache.expert_in(layer, slot)) is not None}
