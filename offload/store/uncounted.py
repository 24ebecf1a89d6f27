"""Use of a store that leaves its counters unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_local.cache.stats import CacheCounters
from moe_local.offload.store.store import ExpertStore
from moe_local.offload.tiers.copies import CopySource


@contextmanager
def uncounted(store: ExpertStore) -> Iterator[None]:
    """Restore the store's counters on exit, so that a trial inside the `with` block is not counted."""
    kept = [_numbers(tier.cache.stats) for tier in store.tiers]
    source, stalls, read = store.tier.source, store.stalls.by_cause(), store.bytes_read
    copied = source.bytes_copied if isinstance(source, CopySource) else 0
    before, store.routed = store.routed, store.routed.empty_twin()
    try:
        yield
    finally:
        store.custody.catch_up()
        if before.settle is not None:
            before.settle()
        store.routed = before
        store.stalls.reset(stalls)
        for tier, numbers in zip(store.tiers, kept, strict=True):
            for name, value in numbers.items():
                setattr(tier.cache.stats, name, value)
        if isinstance(source, CopySource):
            source.bytes_copied = copied
        store.bytes_uncounted += store.bytes_read - read  # threads may still be adding to the source's count


def _numbers(counters: CacheCounters) -> dict[str, object]:
    found = {name: getattr(counters, name) for name in CacheCounters.__slots__}
    return {name: value[:] if isinstance(value, list) else value for name, value in found.items()}
