"""Chooses the kind of memory that a model's sequences get."""

from __future__ import annotations

from typing import Any

from moe_local.offload.dense.state_pieces import forgets_states
from moe_local.offload.engine.encoder_decoder import EncoderDecoder, Translations
from moe_local.offload.engine.kv_rows import KVRows
from moe_local.offload.engine.kv_slab import KVSlab, can_slab, probe_cache
from moe_local.offload.engine.own_caches import OwnCaches
from moe_local.offload.engine.state_slab import StateSlab, can_state_slab
from moe_local.offload.modeling.class_source import class_source


def make_kv(model: Any, rows: int, capacity: int, probe: Any = None) -> KVRows:
    """Memory for `rows` sequences of `capacity` tokens; `probe`: the result of `probe_cache`, if known."""
    if isinstance(model, EncoderDecoder):
        return Translations(model.config, rows, capacity)
    probe = probe_cache(model) if probe is None else probe
    if _looks_into_caches(model):
        return OwnCaches(model.config, rows, capacity)
    if can_slab(probe):
        return KVSlab(probe, rows, capacity)
    if can_state_slab(probe):
        return StateSlab(probe, rows, capacity, whole_prompt_only=forgets_states(model))
    return OwnCaches(model.config, rows, capacity)


def _looks_into_caches(model: Any) -> bool:
    """Whether a module looks at the keys that transformers' own cache has, and at its length after an update,
    which in a slab grows only with the next token; as GLM-5's indexers of pooled keys do."""
    kinds: set[Any] = {type(module) for module in model.modules()}
    return any("cache_layer.keys" in class_source(kind) for kind in kinds)
