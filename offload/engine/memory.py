"""Chooses the kind of memory that a model's sequences get."""

from __future__ import annotations

from typing import Any

from moe_local.offload.dense.state_pieces import forgets_states
from moe_local.offload.engine.encoder_decoder import EncoderDecoder, Translations
from moe_local.offload.engine.kv_rows import KVRows
from moe_local.offload.engine.kv_slab import KVSlab, can_slab, probe_cache
from moe_local.offload.engine.own_caches import OwnCaches
from moe_local.offload.engine.state_slab import StateSlab, can_state_slab


def make_kv(model: Any, rows: int, capacity: int, probe: Any = None) -> KVRows:
    """Memory for `rows` sequences of `capacity` tokens; `probe`: the result of `probe_cache`, if known."""
    if isinstance(model, EncoderDecoder):
        return Translations(model.config, rows, capacity)
    probe = probe_cache(model) if probe is None else probe
    if can_slab(probe):
        return KVSlab(probe, rows, capacity)
    if can_state_slab(probe):
        return StateSlab(probe, rows, capacity, whole_prompt_only=forgets_states(model))
    return OwnCaches(model.config, rows, capacity)
