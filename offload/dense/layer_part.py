"""What the library has to know of a decoder layer to compute it with its experts."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Protocol

import torch

from moe_local.offload.dense.attention_call import AttentionCall
from moe_local.offload.dense.guard import Guard
from moe_local.offload.dense.mixer import mixer_of
from moe_local.offload.dense.router import SETTINGS
from moe_local.offload.dense.token_block import Described
from moe_local.offload.dense.token_delta_net import TokenDeltaNet
from moe_local.offload.kernels.cpu import rounding
from moe_local.offload.kernels.cpu_table import CpuTable
from moe_local.offload.native.library import WholeLayer


class TableOfExperts(Protocol):
    """A module of routed experts that may be left out of a forward."""

    def table(self, x: torch.Tensor) -> CpuTable | None:
        """What computes x [T, D], if a call of the module would do nothing else but `count`; None otherwise.
        Hooks on the module are the caller's business."""

    def count(self, used: int) -> None:
        """Count a pass that used so many different experts."""


class Part(NamedTuple):
    """One of the layers, and what the library was told of it."""

    layer_idx: int
    """Its layer's number in the cache."""
    experts: TableOfExperts
    table: CpuTable
    struct: WholeLayer
    top_k: int
    net: TokenDeltaNet | None
    """What knows its states, if it keeps any."""
    left: int
    """How many numbers the library leaves of a token that is to change them later."""


def part_of(module: Any, like: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> Part | None:
    """The part for inputs like x [n, D] and angles like those among the arguments of a layer's call; None if
    it does not suit. `like`: the layer whose angles it has to take, unless it keeps a state."""
    layer, attention = module._token_layer, attention_of(module)
    mixer, block = mixer_of(attention), module._modules[layer.feed_forward]
    net = mixer if isinstance(mixer, TokenDeltaNet) else None
    if net is None and module is not like and not _is_alike(attention, attention_of(like), x, kwargs):
        return None
    if mixer is None or not mixer.ready(attention, x.dtype) or not layer.ready(module, x):
        return None
    described, table = layer.block.describe(block, x.dtype), table_of(module, x)
    if described is None or table is None:
        return None
    struct = _whole(layer.struct, described, table, mixer.activations, x.dtype)
    left = 0 if net is None else net.left
    return Part(attention.layer_idx, experts_of(module), table, struct, described.router.top_k, net, left)


def _is_alike(attention: Any, first: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a further layer's attention takes what that of the first one takes."""
    mixer, other = mixer_of(attention), mixer_of(first)
    if not isinstance(mixer, AttentionCall) or not isinstance(other, AttentionCall):
        return False
    if type(mixer) is not type(other):
        return False
    if attention.config is not first.config or mixer.most_tokens < other.most_tokens:
        return False
    angles = mixer.angles(kwargs["position_embeddings"])
    return angles is not None and mixer.takes(x.unsqueeze(1), *angles) and mixer.reads_as(other)


def attention_of(module: Any) -> Any:
    return module._modules[module._token_layer.attention]


def keeps_state(module: Any) -> bool:
    return isinstance(mixer_of(attention_of(module)), TokenDeltaNet)


def experts_of(module: Any) -> Any:
    """The TableOfExperts of a decoder layer; None if it has none, or no longer."""
    layer = module._token_layer
    experts = module._modules[layer.feed_forward]._modules.get(layer.block.experts)
    return experts if hasattr(experts, "table") else None


def table_of(module: Any, x: torch.Tensor) -> CpuTable | None:
    experts = experts_of(module)
    return None if experts is None else experts.table(x)


def guard_of(module: Any) -> Guard:
    """Of a decoder layer, its parts, and theirs."""
    layer, attention = module._token_layer, attention_of(module)
    block = module._modules[layer.feed_forward]
    router, mixer = block._modules.get(layer.block.router), mixer_of(attention)
    same = [(attention, "config"), (attention, "layer_idx")]
    if mixer is not None:
        same += mixer.watched(attention)
    if router is not None:
        same += [(router, name) for name in SETTINGS]
    shared = block._modules.get(layer.block.shared)
    if hasattr(shared, "_token_mlp"):
        same += shared._token_mlp.watched(shared)
    guard = Guard(module, [module, attention, *(module._modules[name] for name in layer.norms)], same=same)
    guard += _guard_of_parts(attention) + _guard_of_parts(block)
    return guard if shared is None else guard + _guard_of_parts(shared)


def _guard_of_parts(module: Any) -> Guard:
    """Of a module and its children."""
    return Guard(module, [module, *(part for part in module._modules.values() if part is not None)])


def _whole(
    layer: Any, described: Described, table: CpuTable, activations: str, dtype: torch.dtype
) -> WholeLayer:
    experts, count, gate, counts, of_experts = table.struct(dtype)
    return WholeLayer(
        ctypes.pointer(layer),
        ctypes.pointer(described.router),
        experts,
        count,
        gate,
        counts,
        rounding(activations, dtype),
        of_experts,
        rounding(described.activations, dtype),
        None if described.shared is None else ctypes.pointer(described.shared),
        None if described.share is None else ctypes.pointer(described.share),
    )
