"""Finds out by trial, when a model is loaded, whether cache misses are left to the device.

Misses can be served by the host or by kernels on the device. Both ways compute the same tokens, each from an
empty cache, and the logits and times are compared. The logits are those where the host fetches all misses,
since the CPU rounds otherwise; the times are those of the host's way as it is, in which the CPU may compute
some.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch

from moe_local.cache.keys import format_bytes
from moe_local.offload.engine.engine import Engine
from moe_local.offload.engine.graph_trial import (
    HISTORY,
    allowed_error,
    error_of,
    mode_of,
    row_to_try,
    seconds,
    token_to_try,
    with_room,
)
from moe_local.offload.engine.graphs import Graphs
from moe_local.offload.engine.kv_slab import KVSlab
from moe_local.offload.engine.recording import Saw
from moe_local.offload.engine.token_step import TokenStep
from moe_local.offload.experts import ExpertRunner, OffloadedExperts
from moe_local.offload.gpu.custody import HostAlone
from moe_local.offload.gpu.device_misses import DeviceMisses
from moe_local.offload.kernels import fetch
from moe_local.offload.prefetch.routers import RouterSite
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.store.uncounted import uncounted
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.mapped import is_mapped
from moe_local.offload.tiers.slow_link import link_limit
from moe_local.offload.tiers.staging import StagedArena

VARIABLE = "MOE_LOCAL_DEVICE_MISSES"

LARGEST = 16 << 20
"""Experts of more bytes are not tried unless asked for: copying one takes half a millisecond or more, beside
which the host's overhead of some 0.05 ms a layer is negligible; and the CPU may compute it instead."""

PATTERN, ROUNDS = (0, 1, 0, 2, 1, 2), 2
"""The tokens of a round, half of them repeated, and the timed rounds of each way; one untimed round, whose
logits are compared, comes first."""

logger = logging.getLogger(__name__)


def miss_mode() -> str:
    """What MOE_LOCAL_DEVICE_MISSES says; see `mode_of`."""
    return mode_of(VARIABLE)


class MissSwitch:
    """Switches a model between misses served by the host and by the device. Only between two steps."""

    def __init__(
        self,
        engine: Engine,
        runner: ExpertRunner,
        misses: DeviceMisses,
        by_host: TokenStep,
        by_device: TokenStep,
    ) -> None:
        self._engine = engine
        self._runner = runner
        self._misses = misses
        self._steps = {False: by_host, True: by_device}
        self.on_device = False

    def turn(self, *, to_device: bool) -> None:
        store, self.on_device = self._runner.store, to_device
        store.custody.release()
        store.custody = self._misses if to_device else HostAlone()
        self._runner.token_path = self._misses if to_device else None
        self._engine.token_step = self._steps[to_device]


def leave_misses_to_device(
    engine: Engine,
    runner: ExpertRunner,
    graphs: Graphs | None,
    *,
    sites: Sequence[RouterSite | None] = (),
    saw: Saw | None = None,
    mode: str = "auto",
    prefetch: str = "auto",
) -> MissSwitch | None:
    """Let the device look up and fetch the experts of single tokens, if that works here and is faster.

    For an engine whose tokens are computed at fixed addresses (`use_graphs`); `sites` and `saw` as there. The
    store's fastest tier is empty afterwards. Returns the switch between both ways; None if the device's way
    does not work, in which case the reason is logged.
    """
    if mode == "off":
        return None
    store = runner.store
    reason = hindrance(engine, runner, mode, prefetch)
    kernels = fetch.fetch_kernels(store.tier.arena.device) if reason is None else None
    if kernels is None:
        logger.info("misses are the host's to schedule: %s", reason or "Triton does not run here")
        return None
    by_host = engine.token_step
    assert by_host is not None
    misses = DeviceMisses(store, runner.grouped, kernels)
    by_device = engine.make_token_step(graphs if by_host.captures else None, sites, saw, misses)
    switch = MissSwitch(engine, runner, misses, by_host, by_device)
    with uncounted(store):
        reason, slower = with_room(engine, lambda: _try(engine, store, switch))
    reason = reason or by_device.failure
    switch.turn(to_device=reason is None and (mode == "on" or not slower))
    (by_host if switch.on_device else by_device).captured.clear()
    if reason is not None:
        logger.info("misses are the host's to schedule: %s", reason)
        return None
    if not switch.on_device:
        logger.info("misses are the host's to schedule: left to the device, they took longer")
    return switch


def hindrance(engine: Engine, runner: ExpertRunner, mode: str, prefetch: str) -> str | None:
    """Why the device's way is not even tried; None: try it."""
    store, below = runner.store, runner.store.below
    layers = range(len(store.layouts))
    if below is None or len(store.tier.devices) != 1:
        return "experts are not cached on one device"
    if all(store.slots(layer) >= store.num_experts(layer) for layer in layers):
        return "no expert will ever be missing"
    if engine.token_step is None:
        return "tokens are not computed at fixed addresses"
    if prefetch not in ("auto", "off"):
        return f"prefetch is {prefetch!r}, which is the host's"
    if store.host is not None and store.host.scheduler.mode == "cpu":
        return "miss is 'cpu': the CPU is to compute them"
    if not all(below.cache.has_all(layer, range(store.num_experts(layer))) for layer in layers):
        return "RAM does not hold every expert"
    if any(store.slots(layer) < store.routed.top_k(layer) for layer in layers):
        return "a layer has fewer slots than a token needs"
    if any(layout != layer[0] for layer in store.layouts for layout in layer):
        return "experts of a layer have several formats"
    largest = max(layer[0].nbytes for layer in store.layouts)
    if largest > LARGEST and mode != "on":
        return f"an expert has {format_bytes(largest)}, beside which the host's part does not count"
    for module in engine.hf.modules():
        if isinstance(module, OffloadedExperts):
            layout = store.layouts[module.index][0]
            if runner.grouped.launcher(module, store.tier.arena.device, layout) is None:
                return "the grouped kernels do not serve its experts"
    if link_limit() is not None:
        return "copies are held to a slower link's speed, which kernels would not keep to"
    memory = (
        below.arena.own.memory
        if isinstance(below.arena, StagedArena) and isinstance(below.arena.own, HostArena)
        else None
    )
    if memory is None or (store.tier.arena.device.type == "cuda" and not is_mapped(memory)):
        return "the device does not see all of the RAM that holds experts"
    return None


def _clear(store: ExpertStore) -> None:
    """Zero all slots: the host's way may have left the right experts in them, which would hide errors."""
    for layer in range(len(store.layouts)):
        for slot in range(store.slots(layer)):
            store.tier.arena.buffer(layer, slot).zero_()


def _try(engine: Engine, store: ExpertStore, switch: MissSwitch) -> tuple[str | None, bool]:
    """(what is wrong with the device's way, or None; whether it is slower)."""
    times: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, list[torch.Tensor]] = {}
    share = store.host
    assert isinstance(engine.kv, KVSlab)
    with row_to_try(engine) as row, torch.inference_mode():
        put_back = engine.kv.mark(row)
        try:
            for number in range(ROUNDS + 1):
                for to_device in (False, True) if number % 2 else (True, False):
                    switch.turn(to_device=to_device)
                    store.empty()
                    if to_device:
                        _clear(store)
                    put_back()
                    # Experts that the CPU computes are rounded in other places, which deep models amplify.
                    store.host = share if number else None
                    logits, took = _one_round(engine, row)
                    store.check_integrity()
                    if number:
                        times[to_device].append(took)
                    else:
                        found[to_device] = logits
        finally:
            store.host = share
    store.custody.release()
    store.empty()
    off = [error_of(*pair) for pair in zip(found[True], found[False], strict=True)]
    allowed = allowed_error(engine.hf.dtype)
    if not all(error <= allowed for error in off):
        return f"logits were off by {max(off):.2g} of their norm, where {allowed} is allowed", False
    return None, min(times[True]) > min(times[False])


def _one_round(engine: Engine, row: int) -> tuple[list[torch.Tensor], float]:
    """The logits of PATTERN's tokens, computed in the current way, and the seconds that it took."""
    step = engine.token_step
    assert step is not None
    logits: list[torch.Tensor] = []

    def compute(token: int) -> torch.Tensor:
        logits.append(step.logits(row, token_to_try(engine, HISTORY + token)).clone())
        return logits[-1]

    took = sum(seconds(partial(compute, token)) for token in PATTERN)
    return logits, took
