"""From an expert file and a plan to a working store: arenas, tiers and sources, wired."""

from __future__ import annotations

from collections.abc import Sequence

from moe_local.cache.expert_cache import ExpertCache
from moe_local.cache.keys import ExpertKey
from moe_local.cache.stats import RouterLoad
from moe_local.offload.checkpoint.spec import ModelSpec
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.expert_file.native import NativeExperts
from moe_local.offload.plan.free_memory import free_ram
from moe_local.offload.schedule.scheduler import MissScheduler
from moe_local.offload.store import ExpertStore
from moe_local.offload.tiers.arena import DeviceArena, HostArena
from moe_local.offload.tiers.copies import CopySource
from moe_local.offload.tiers.device import Device
from moe_local.offload.tiers.staging import StagedArena
from moe_local.offload.tiers.tiers import Tier
from moe_local.offload.tiers.transfer import FileSource, Location, ScatteredLocation


def build_store(
    file: ExpertFile | NativeExperts,
    spec: ModelSpec,
    *,
    ram_slots: Sequence[int],
    vram_slots: Sequence[int] | None = None,
    device: Device | None = None,
    policy: str = "adaptive",
    read_threads: int = 4,
    scheduler: MissScheduler | None = None,
    vram_staging: int = 0,
    ram_staging: int = 0,
) -> ExpertStore:
    """A store over `file` with so many slots per MoE layer; the caller closes it.

    Without a device, RAM is the fastest tier and its misses are read from disk. With one, `vram_slots` are
    the fastest, filled from RAM, which is filled from disk, and `scheduler` says what the CPU computes
    instead. Prompts stream through `vram_staging` and `ram_staging` slots beside these. Nothing is loaded
    yet (`Tier.preload` does). Raises DoesNotFitError if an arena is refused.
    """
    layouts = [[file.layout(layer.index, e) for e in range(layer.num_experts)] for layer in spec.layers]
    strides = [max(layout.nbytes for layout in layer) for layer in layouts]

    def size(layer: int, expert: int) -> int:
        return layouts[layer][expert].nbytes

    def locate(key: ExpertKey) -> Location | ScatteredLocation:
        if isinstance(file, NativeExperts):
            return file.locate(key)
        path, offset, nbytes = file.location(*key)
        return Location(path, offset, nbytes, file.checksum(*key))

    pin = device is not None and device.torch_device.type == "cuda"
    host = HostArena(ram_slots, strides, pin=pin)
    ring = HostArena([ram_staging], [max(strides)], pin=pin)

    def target(layer: int, slot: int) -> memoryview:
        return host.view(layer, slot) if slot >= 0 else ring.view(0, ~slot)

    total = sum(layout.nbytes for layer in layouts for layout in layer)
    direct = total > free_ram(reserve=False)  # or the page cache would keep them for the next time
    disk = FileSource(locate, target, threads=read_threads, direct=direct)
    routed = RouterLoad([layer.num_experts for layer in spec.layers], [layer.top_k for layer in spec.layers])
    ram = Tier(ExpertCache(ram_slots, policy, size, ram_staging), StagedArena(host, ring), disk)
    try:
        if device is None or vram_slots is None:
            return ExpertStore(ram, layouts, routed, disk=disk)
        arena = StagedArena(
            DeviceArena(vram_slots, strides, device), DeviceArena([vram_staging], [max(strides)], device)
        )
        source = CopySource(ram, arena, device, lambda key: size(*key))
        vram = Tier(ExpertCache(vram_slots, policy, size, vram_staging), arena, source, device)
        return ExpertStore(vram, layouts, routed, disk=disk, below=ram, scheduler=scheduler)
    except BaseException:
        ram.close()  # its reader threads are running
        raise
