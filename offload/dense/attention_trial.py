"""Finds out by trial which attention modules of a model the C++ library can compute."""

from __future__ import annotations

from typing import Any

import torch

from moe_local.offload.dense.attention_call import AttentionCall, Way, direct
from moe_local.offload.dense.places import Places
from moe_local.offload.dense.token_attention import TokenAttention
from moe_local.offload.dense.token_calls import agrees_on_sizes, all_close, attempt, token_calls
from moe_local.offload.dense.token_latent_attention import TokenLatentAttention
from moe_local.offload.native.library import library

KINDS: tuple[type[AttentionCall], ...] = TokenAttention, TokenLatentAttention

HISTORY = 5
"""Earlier positions in the cache of a trial."""

FAR = 1_000_000
"""The position given in a trial: beyond the original training length, past which some models scale angles."""


def use_token_attention(model: Any) -> None:
    """Let the library compute those attention modules of `model`, in CPU memory, that it is able to.

    This holds for one token of each of a few sequences whose cache layers are DirectLayers; all other calls
    run as before. Trials decide which modules qualify, never a model's name. Runs a forward of one token, for
    which experts must return something.
    """
    if library() is None or model.device.type != "cpu" or model.config.is_encoder_decoder:
        return
    ways: dict[type[AttentionCall], Way] = {}
    candidates = [module for module in model.modules() if hasattr(module, "o_proj")]
    for called, (args, arguments, *_) in token_calls(model, candidates).items():
        module: Any = called
        calls = None if args else _call_for(module, arguments)
        if calls is None:
            continue
        cos, _sin = calls.angles(arguments["position_embeddings"])  # type: ignore[misc]
        # Layers of a model mostly use the same rotary embedding, so the last way that agreed comes first; but
        # each layer is tried, since modules of one class may still depend on their layer's index.
        last = ways.get(type(calls))
        for way in (*([] if last is None else [last]), *calls.ways(cos)):
            if _agrees(module, calls, way, arguments):
                ways[type(calls)] = way
                module._token_attention = calls
                cls: Any = type(module)
                module.__class__ = direct(cls)
                break


def _call_for(module: Any, arguments: dict[str, Any]) -> AttentionCall | None:
    """The call for a module of either kind of attention, called with these arguments; None for others."""
    for kind in KINDS:
        calls = kind.of(module, arguments["hidden_states"].dtype) if "hidden_states" in arguments else None
        if calls is not None and calls.angles(arguments.get("position_embeddings")) is not None:
            return calls
    return None


def _agrees(module: Any, calls: AttentionCall, way: Way, arguments: dict[str, Any]) -> bool:
    """Whether the library's call and the module give the same. The position given is a far one, to reveal
    modules in which more than the rotation angles depends on it."""
    calls.take(way)
    generator = torch.Generator().manual_seed(11)
    return agrees_on_sizes(lambda size: _agrees_at(module, calls, arguments, size, generator))


def _agrees_at(
    module: Any, calls: AttentionCall, arguments: dict[str, Any], size: float, generator: torch.Generator
) -> bool:
    from transformers.cache_utils import DynamicCache

    x, given = arguments["hidden_states"], arguments["position_embeddings"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(x.dtype)

    x = size * random(*x.shape)
    if isinstance(given, tuple):
        angles: Any = tuple(random(*part.shape) for part in given)
    else:
        angles = torch.complex(*(random(*given.shape).float() for _ in range(2)))
    key_shape, value_shape = calls.history(HISTORY)
    keys, values = size * random(*key_shape), random(*value_shape)
    cache, name = DynamicCache(), "cache" if "cache" in arguments else "past_key_values"
    cache.update(keys, values, module.layer_idx)
    changed = {"hidden_states": x, "position_embeddings": angles, name: cache, "attention_mask": None}
    changed |= {
        name: torch.full_like(arguments[name], FAR)
        for name in ("position_ids", "cache_position")
        if arguments.get(name) is not None
    }
    rooms = [torch.cat([given, torch.zeros_like(given[:, :, :1])], 2) for given in (keys, values)]
    places = Places(rooms[0], rooms[1], [0], [HISTORY])
    wanted = attempt(module, **arguments | changed)
    if not isinstance(wanted, tuple):
        return False
    with torch.no_grad():
        cos, sin = calls.angles(angles)  # type: ignore[misc]
        if not calls.takes(x, cos, sin) or not calls.ready(module, x.dtype):
            return False
        got = calls(x, cos, sin, places)
    layer = cache.layers[module.layer_idx]
    pairs = [(got, wanted[0]), (places.keys, layer.keys), (places.values, layer.values)]
    return all_close(pairs, calls.activations)
