"""Which memory of its sequences a model gets."""

from __future__ import annotations

from typing import Any

from moe_local.offload.engine.kv_slab import KVRows, KVSlab, can_slab, probe_cache
from moe_local.offload.engine.own_caches import OwnCaches
from moe_local.offload.engine.state_slab import StateSlab, can_state_slab


def make_kv(model: Any, rows: int, capacity: int, probe: Any = None) -> KVRows:
    """Memory for `rows` sequences of `capacity` tokens; `probe`: what `probe_cache` gave, if at hand."""
    probe = probe_cache(model) if probe is None else probe
    if can_slab(probe):
        return KVSlab(probe, rows, capacity)
    if can_state_slab(probe):
        model_type = model.config.get_text_config(decoder=True).model_type
        return StateSlab(probe, rows, capacity, model_type)
    return OwnCaches(model.config, rows, capacity)
