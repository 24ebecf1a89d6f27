"""Finds out by trial which attention modules of a model the C++ library can compute."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from moe_local.offload.dense.token_attention import PROJECTIONS, Places, TokenAttention, Way, direct
from moe_local.offload.dense.token_calls import token_calls
from moe_local.offload.native.library import HALVES, NEIGHBOURS, library

HISTORY = 5
"""Earlier positions in the cache of a trial."""

FAR = 1_000_000
"""The position given in a trial: beyond the original training length, past which some models scale angles."""

DRAWS = 4
"""Most random inputs of one magnitude that a module is tried with; one that agrees is enough. With large
scores the softmax picks one position, and rounding to 16 bits may decide between two close ones. A module
that differs in more than that never agrees."""


def use_token_attention(model: Any) -> None:
    """Let the library compute those attention modules of `model`, in CPU memory, that it is able to.

    This holds for one token of each of a few sequences whose cache layers are DirectLayers; all other calls
    run as before. Trials decide which modules qualify, never a model's name. Runs a forward of one token, for
    which experts must return something.
    """
    if library() is None or model.device.type != "cpu" or model.config.is_encoder_decoder:
        return
    ways: list[Way] = []
    candidates = [module for module in model.modules() if all(hasattr(module, name) for name in PROJECTIONS)]
    for called, (args, arguments, *_) in token_calls(model, candidates).items():
        if args or not isinstance(arguments.get("position_embeddings"), tuple):
            continue
        module: Any = called
        calls = TokenAttention.of(module, arguments["hidden_states"].dtype)
        if calls is None:
            continue
        # Layers of a model mostly use the same rotary embedding, so the last way that agreed comes first; but
        # each layer is tried, since modules of one class may still depend on their layer's index.
        for way in (*ways, *_ways(arguments)):
            if _agrees(module, calls, way, arguments):
                ways = [way]
                module._token_attention = calls
                cls: Any = type(module)
                module.__class__ = direct(cls)
                break


def _ways(arguments: dict[str, Any]) -> Iterator[Way]:
    count = arguments["position_embeddings"][0].shape[-1]
    for rotation, shared in product((HALVES, NEIGHBOURS), (False, True)):
        yield Way(count, rotation, shared)
    yield from (Way(2 * count, rotation, True) for rotation in (HALVES, NEIGHBOURS))


def _agrees(module: Any, calls: TokenAttention, way: Way, arguments: dict[str, Any]) -> bool:
    """Whether the library's call and the module give the same, on small and on large numbers.

    Large numbers reveal clamping of queries or scores, which small ones do not. The position given is a far
    one, to reveal modules in which more than the rotation angles depends on it.
    """
    if way.rotated > calls.shape.width or way.rotated % 2:
        return False
    calls.take(way)
    generator = torch.Generator().manual_seed(11)
    return all(
        any(_agrees_at(module, calls, arguments, size, generator) for _ in range(DRAWS))
        for size in (0.05, 1.0, 40.0)
    )


def _agrees_at(
    module: Any, calls: TokenAttention, arguments: dict[str, Any], size: float, generator: torch.Generator
) -> bool:
    from transformers.cache_utils import DynamicCache

    x, (cos, _sin) = arguments["hidden_states"], arguments["position_embeddings"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(x.dtype)

    x, cos, sin = size * random(*x.shape), random(*cos.shape), random(*cos.shape)
    history = 1, calls.shape.kv_heads, HISTORY, calls.shape.width
    keys, values = size * random(*history), random(*history)
    cache, name = DynamicCache(), "cache" if "cache" in arguments else "past_key_values"
    cache.update(keys, values, module.layer_idx)
    changed = {"hidden_states": x, "position_embeddings": (cos, sin), name: cache, "attention_mask": None}
    changed |= {
        name: torch.full_like(arguments[name], FAR)
        for name in ("position_ids", "cache_position")
        if arguments.get(name) is not None
    }
    room = torch.zeros(1, *history[1:2], 1, history[3], dtype=x.dtype)
    places = Places(torch.cat([keys, room], 2), torch.cat([values, room], 2), [0], [HISTORY])
    with torch.no_grad():
        try:
            wanted = module(**arguments | changed)[0]
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        if not calls.takes(x, cos, sin) or not calls.ready(module, x.dtype):
            return False
        got = calls(x, cos, sin, places)
    layer = cache.layers[module.layer_idx]
    pairs = [(got, wanted), (places.keys, layer.keys), (places.values, layer.values)]
    return all(a.shape == b.shape and _close(a, b, calls.activations) for a, b in pairs)


def _close(got: torch.Tensor, wanted: torch.Tensor, activations: str) -> bool:
    allowed = 0.1 if activations == "int8" else {torch.float32: 1e-4}.get(wanted.dtype, 0.03)
    off = (got.float() - wanted.float()).norm()
    return bool(off <= allowed * wanted.float().norm())
