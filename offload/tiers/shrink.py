"""Removes slots from a device's tier while it is in use, to free their memory."""

from __future__ import annotations

from collections.abc import Mapping

from moe_local.cache.keys import ExpertKey
from moe_local.offload.system.interrupt import LOOK_SECONDS
from moe_local.offload.system.interrupt import check as check_interrupt
from moe_local.offload.tiers.copies import CopySource
from moe_local.offload.tiers.device import Device
from moe_local.offload.tiers.device_arena import DeviceArena
from moe_local.offload.tiers.tiers import Tier


def shrink(tier: Tier, arena: DeviceArena, nbytes: int, device: Device) -> int:
    """Free slots of `device` until `nbytes` have been freed or no more can be; the bytes freed.

    The tier's `arena` says which slots are next. Their experts are evicted; loads into them are cancelled or,
    if that is impossible, waited for, and so are kernels that read them. Stops at a leased slot, whose lease
    stays valid. All tables are consistent if a Ctrl-C raises KeyboardInterrupt.
    """
    source = tier.source
    assert isinstance(source, CopySource)
    freed = 0
    try:
        while freed < nbytes:
            left = arena.next_to_go(device)
            if left is None or not _clear(tier, source, left):
                break
            freed += arena.give_back(device)
    finally:
        if freed:
            device.trim()
    return freed


def _clear(tier: Tier, source: CopySource, left: Mapping[int, int]) -> bool:
    """Remove all but the first slots of these layers from the cache; False, and nothing, if one is leased."""
    cache = tier.cache
    held = [ExpertKey(layer, e) for layer, count in left.items() for e in cache.in_slots(layer, count)]
    if any(cache.pins(*key) for key in held):
        return False
    while under_way := [key for key in held if key.expert in cache.loading(key.layer)]:
        for key in under_way:
            tier.cancel(key)
        tier.poll()
        if any(key.expert in cache.loading(key.layer) for key in held):
            source.wait(LOOK_SECONDS)
            check_interrupt()
            tier.poll()
    for layer, count in left.items():
        source.forget(layer, count)
    for layer, count in left.items():
        cache.keep_slots(layer, count)
    return True
