"""From an expert file and a plan to a working store: arenas, tiers and sources, wired."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace

from moe_local.cache.beside import Beside
from moe_local.cache.errors import DoesNotFitError
from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.keys import ExpertKey
from moe_local.cache.stats import RouterLoad
from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.expert_file.native import NativeExperts
from moe_local.offload.plan.free_memory import free_ram
from moe_local.offload.plan.placement import with_vram_slots
from moe_local.offload.plan.plan import Ladders, Plan, largest
from moe_local.offload.schedule.scheduler import MissScheduler
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.tiers.arena import HostArena
from moe_local.offload.tiers.copies import CopySource
from moe_local.offload.tiers.device import Device
from moe_local.offload.tiers.device_arena import DeviceArena
from moe_local.offload.tiers.location import Location, ScatteredLocation
from moe_local.offload.tiers.staging import StagedArena
from moe_local.offload.tiers.tiers import Tier
from moe_local.offload.tiers.transfer import FileSource

logger = logging.getLogger(__name__)


def build_arena(plan: Plan, cards: Sequence[Device]) -> tuple[DeviceArena, Plan]:
    """Allocate the plan's expert slots on its cards. Returns the arena, and the plan as it came out.

    The caller closes the arena, or the store that it is passed to does. If a card refuses part of the memory,
    there are fewer slots, down to top-k per layer, so that the prompt workspace and the staging ring still
    fit; if even those do not, the ring is given up. Raises DoesNotFitError.
    """
    ring = plan.vram_staging * largest(plan.request.ladders)
    try:
        arena = _arena(plan, cards, spare=ring)
    except DoesNotFitError:
        if not ring:
            raise
        plan = replace(plan, vram_staging=0)
        arena = _arena(plan, cards)
    found = with_vram_slots(plan, arena.slots)
    if found is not plan:
        logger.warning(
            "part of the VRAM was refused: there is room for %d of the %d experts planned (mode %s); "
            "close other programs on the card and load again to have them all",
            sum(found.vram_slots),
            sum(plan.vram_slots),
            found.mode,
        )
    return arena, found


def _arena(plan: Plan, cards: Sequence[Device], spare: int = 0) -> DeviceArena:
    """`spare`: bytes to leave free on each card in addition to the workspace."""
    layers, slots = plan.request.spec.layers, plan.vram_slots
    device = [cards[plan.card_of(layer.index)] for layer in layers]
    least = [min(layer.top_k, count) for layer, count in zip(layers, slots, strict=True)]
    spare += plan.bytes.workspace // len(cards)
    return DeviceArena(slots, plan.request.ladders, device, least=least, spare=spare)


def build_store(
    file: ExpertFile | NativeExperts,
    spec: ModelSpec,
    *,
    ladders: Ladders,
    ram_slots: Sequence[int],
    arena: DeviceArena | None = None,
    policy: str = "adaptive",
    scheduler: MissScheduler | None = None,
    vram_staging: int = 0,
    ram_staging: int = 0,
) -> ExpertStore:
    """A store over `file` with so many slots per MoE layer; the caller closes it.

    Without an arena on a device, RAM is the fastest tier and its misses are read from disk. With one, which
    the store owns from now on, that is the fastest, filled from RAM, which is filled from disk, and
    `scheduler` says what the CPU computes instead. Prompts stream through `vram_staging` and `ram_staging`
    slots beside these, the former on each device, where all of these have room. `ladders` as for the arena.
    Nothing is loaded yet (`Tier.preload` does). Raises DoesNotFitError if RAM is refused.
    """
    layouts = [[file.layout(layer.index, e) for e in range(layer.num_experts)] for layer in spec.layers]
    largest = max(map(max, ladders))
    total = sum(layout.nbytes for layer in layouts for layout in layer)
    free = free_ram(reserve=False)

    def size(layer: int, expert: int) -> int:
        return layouts[layer][expert].nbytes

    def locate(key: ExpertKey) -> Location | ScatteredLocation:
        if isinstance(file, NativeExperts):
            return file.locate(key)
        path, offset, nbytes = file.location(*key)
        return Location(path, offset, nbytes, file.checksum(*key))

    pin = arena is not None and arena.device.type == "cuda"
    # On an error everything is closed in order: memory freed while pinned would stay registered for whoever
    # gets its addresses next, and reader threads would wait forever.
    with contextlib.ExitStack() as undo:
        host = HostArena(ram_slots, ladders, pin=pin)
        undo.callback(host.close)
        ring = HostArena([ram_staging], [largest], pin=pin)
        undo.callback(ring.close)

        def target(layer: int, slot: int) -> memoryview:
            return host.view(layer, slot) if slot >= 0 else ring.view(0, ~slot)

        direct = past_page_cache(total, host.nbytes, free)
        disk = FileSource(locate, target, direct=direct)
        undo.callback(disk.close)
        routed = RouterLoad(
            [layer.num_experts for layer in spec.layers], [layer.top_k for layer in spec.layers]
        )
        beside = Beside(policy, len(ram_slots))
        ram_policy = policy if arena is None else beside
        cache = ExpertCache(ram_slots, ram_policy, size, ram_staging, ladders)
        ram = Tier(cache, StagedArena(host, ring), disk)
        if arena is None:
            store = ExpertStore(ram, layouts, routed, disk=disk)
        else:
            staged = StagedArena.beside(arena, vram_staging, largest)
            source = CopySource(ram, staged, arena.devices, lambda key: size(*key))
            beside.above = ExpertCache(arena.slots, policy, size, staged.ring_slots, ladders)
            vram = Tier(beside.above, staged, source, arena.devices)
            store = ExpertStore(vram, layouts, routed, disk=disk, below=ram, scheduler=scheduler)
        undo.pop_all()
        return store


def past_page_cache(total: int, arena: int, free: int) -> bool:
    """Whether to read experts of `total` bytes past the page cache, because it could not hold them.

    The page cache has the RAM that was `free` before, less the arena's bytes. Where the arena has a slot for
    every expert, each is read only once, so the page cache can only speed up the next load of the model.
    """
    return total > (free if arena >= total else free - arena)
