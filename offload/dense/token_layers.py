"""Tokens' pass through consecutive decoder layers, their experts included, in one library call."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from moe_local.offload.dense.guard import Guard
from moe_local.offload.dense.token_attention import Places
from moe_local.offload.dense.token_calls import Call
from moe_local.offload.kernels.cpu import rounding
from moe_local.offload.kernels.cpu_table import CpuTable
from moe_local.offload.native import library as native
from moe_local.offload.native.library import WholeLayer, check, library
from moe_local.offload.system.interrupt import check as check_interrupt
from moe_local.offload.system.threads import kernel_threads

SHARED = ("position_embeddings", "past_key_values", "cache")
"""Arguments that all layers of a forward must have in common."""

FEWEST = 2
"""With fewer layers, TokenLayer's calls are as fast."""


class TableOfExperts(Protocol):
    """A module of routed experts that may be left out of a forward."""

    def table(self, x: torch.Tensor) -> CpuTable | None:
        """What computes x [T, D], if a call of the module would do nothing else but `count`; None otherwise.
        Hooks on the module are the caller's business."""

    def count(self, used: int) -> None:
        """Count a pass that used so many different experts."""


class Part(NamedTuple):
    """One of the layers, and what the library was told of it."""

    layer: int
    """Its number in the cache."""
    experts: TableOfExperts
    table: CpuTable
    struct: WholeLayer


class Ahead(NamedTuple):
    """What layers were computed with, and what they gave, before they were called."""

    arguments: Mapping[str, Any]
    """The first layer's."""
    masks: list[torch.Tensor | None]
    """For each layer, the mask with which it was asked for its places."""
    places: list[Places]
    outputs: Sequence[torch.Tensor]
    """For each layer, [n, 1, D]."""


class TokenLayers:
    """The library's call for decoder layers in a row, each computed as by its TokenLayer, with the same bits.

    transformers calls layers one after the other, and each time the experts' weights have swept what Python
    needs out of the caches, so that it takes longer than a layer's attention. So the call of the first layer
    computes all of them, and the others return what is there already. They do so only if they are called with
    the output of the layer before and with arguments that mean what was assumed. Otherwise the layer is
    computed by itself, which writes the same columns of the cache again, and so are those behind it.
    """

    def __init__(self, modules: Sequence[Any], above: Sequence[nn.Module]) -> None:
        """`modules`: consecutive decoder layers with a `_token_layer` each, whose `block` is not None.
        `above`: the modules that contain them. As long as one of these has other children than now, nothing
        is computed ahead, since layers may be called in another order."""
        self._modules = modules
        self._above = _all(Guard(module, []) for module in above)
        self._parts: list[Part] = []
        """Of the first modules, as many as can be computed together."""
        self._structs: ctypes.Array[WholeLayer] | None = None
        self._guard: Guard | None = None
        """Of all that the parts depend on."""
        self._dtype: torch.dtype | None = None
        """The dtype of the inputs that the parts are for."""
        self._ahead: Ahead | None = None

    @classmethod
    def join(cls, model: nn.Module, calls: Mapping[nn.Module, Call]) -> None:
        """Let those of the called modules that have a `_token_layer` and follow each other be computed
        together. `calls` are those of one forward of `model`, in order.

        The model owns the new objects, and the layers know them by weak references, so that no cycle keeps
        the weights of a model that nobody needs any more.
        """
        rows: list[list[nn.Module]] = [[]]
        before: Call | None = None
        for module, call in calls.items():
            layer = getattr(module, "_token_layer", None)
            if layer is None or layer.block is None or _experts_of(module) is None:
                before = None
                continue
            if before is None or not _follows(call, before):
                rows.append([])
            rows[-1].append(module)
            before = call
        for row in rows:
            if len(row) >= FEWEST:
                together = cls(row, _above(model, row))
                vars(model).setdefault("_token_layers", []).append(together)
                for number, module in enumerate(row):
                    vars(module)["_token_layer"].among = (weakref.ref(together), number)

    def output(self, number: int, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """x [n, 1, D] -> layer `number`'s output [n, 1, D]; None: the layer has to be computed by itself."""
        if number == 0:
            self._ahead = self._compute(x, kwargs)
        elif self._ahead is not None and not self._goes_on(self._ahead, number, x, kwargs):
            self._ahead = None
        ahead = self._ahead
        if ahead is None:
            return None
        if number + 1 == len(ahead.outputs):
            self._ahead = None
        return ahead.outputs[number]

    def _goes_on(self, ahead: Ahead, number: int, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether layer `number` is called as was assumed when it was computed."""
        if x is not ahead.outputs[number - 1]:
            return False
        if any(kwargs.get(name) is not ahead.arguments.get(name) for name in SHARED):
            return False
        if kwargs.get("attention_mask") is ahead.masks[number]:
            return True
        module, assumed = self._modules[number], ahead.places[number]
        places = module._token_layer.places(module, x, kwargs)
        return places is not None and places[2:] == assumed[2:]

    def _compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> Ahead | None:
        """Compute as many layers as possible; None if they are too few."""
        check_interrupt()
        lib, first = library(), self._modules[0]
        assert lib is not None
        experts = _experts_of(first)
        if experts is None or experts.table(x.view(-1, x.shape[-1])) is None or not self._above.holds():
            return None
        where = first._token_layer.places(first, x, kwargs)  # with all that depends on the call
        if where is None:
            return None
        if self._guard is None or self._dtype is not x.dtype or not self._guard.holds():
            self._take(x, kwargs)
        tokens = len(where.lasts)
        masks, places = self._places(x.view(tokens, -1), where, kwargs)
        if len(places) < FEWEST:
            return None
        cos, sin = kwargs["position_embeddings"]
        y = torch.empty(len(places), *x.shape, dtype=x.dtype)
        used = (ctypes.c_int64 * len(places))()
        status = lib.moe_layers(
            self._structs,
            len(places),
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            (native.Sequence * (len(places) * tokens))(*(row for one in places for row in one.rows())),
            tokens,
            y.data_ptr(),
            used,
            kernel_threads(),
        )
        if status == native.BAD_ARGUMENT:  # such as NaN in a router: the layers' own calls have words for it
            return None
        check(status)
        for part, count in zip(self._parts, used, strict=False):
            part.experts.count(count)
        return Ahead(kwargs, masks, places, y.unbind())

    def _places(
        self, x: torch.Tensor, first: Places, kwargs: dict[str, Any]
    ) -> tuple[list[torch.Tensor | None], list[Places]]:
        """Masks and places of the parts that can serve x [n, D]; the first one's places are known."""
        masks: list[torch.Tensor | None] = []
        places: list[Places] = []
        where: Places | None
        mask = kwargs.get("attention_mask")
        layers = kwargs.get("cache", kwargs.get("past_key_values")).layers  # type: ignore[union-attr]
        for part in self._parts:
            assumed, where = mask, first
            if places:
                direct = getattr(layers[part.layer], "direct", _nowhere)
                where = direct(mask)
                if where is None and mask is not None:  # another window: the layer gets another mask, or none
                    assumed, where = None, direct(None)
            if where is None or where.lasts != first.lasts or part.experts.table(x) is not part.table:
                break
            if where.keys.shape[2] != first.keys.shape[2] or where.keys.dtype is not x.dtype:
                break
            masks.append(assumed)
            places.append(where)
        return masks, places

    def _take(self, x: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Find out anew which of the modules can be computed together, for inputs like x [n, 1, D]."""
        self._parts, self._guard, self._dtype = [], None, x.dtype
        structs, guards = [], []
        unmasked = {**kwargs, "attention_mask": None}
        for module in self._modules:
            layer, parts = module._token_layer, module._modules
            attention, block = parts[layer.attention], parts[layer.feed_forward]
            if (layer.places(module, x, kwargs) or layer.places(module, x, unmasked)) is None:
                break
            if attention.config is not self._modules[0]._modules[layer.attention].config:
                break
            router, experts = layer.block.struct(block, x.dtype), _experts_of(module)
            table = None if router is None or experts is None else experts.table(x.view(-1, x.shape[-1]))
            if table is None:
                break
            guard = Guard(module, [module, attention, *(parts[name] for name in layer.norms)])
            guard += Guard(attention, list(attention._modules.values()))
            guard += Guard(block, [block, *block._modules.values()])
            if not guard.holds():
                break
            calls = attention._token_attention
            struct = _whole(layer.struct, router, table, rounding(calls.activations, x.dtype), x.dtype)
            self._parts.append(Part(attention.layer_idx, experts, table, struct))
            guards.append(guard)
            structs.append(struct)
        self._structs = (WholeLayer * len(structs))(*structs)
        self._guard = _all(guards) if guards else None

    def __reduce__(self) -> Any:
        """A copy of a model has none: what it contains would not be the copy's."""
        return type(None), ()


def _nowhere(mask: torch.Tensor | None) -> None:
    return None


def _all(guards: Iterable[Guard]) -> Guard:
    return reduce(add, guards)


def _above(model: nn.Module, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules within `model`, itself included, that contain some of these."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for module in modules:
        name = names[module]
        while name:
            name = name.rpartition(".")[0]
            found[name] = model.get_submodule(name)
    return list(found.values())


def _follows(call: Call, before: Call) -> bool:
    """Whether a layer was called with the output of the one before it and the same shared arguments."""
    given = call.args[0] if len(call.args) == 1 else None
    alike = all(call.kwargs.get(name) is before.kwargs.get(name) for name in SHARED)
    return given is not None and given is before.output and alike


def _experts_of(module: Any) -> Any:
    """The TableOfExperts of a decoder layer; None if it has none, or no longer."""
    layer = module._token_layer
    experts = module._modules[layer.feed_forward]._modules.get(layer.block.experts)
    return experts if hasattr(experts, "table") else None


def _whole(layer: Any, router: Any, table: CpuTable, activations: int, dtype: torch.dtype) -> WholeLayer:
    experts, count, gate, counts, of_experts = table.struct(dtype)
    return WholeLayer(
        ctypes.pointer(layer), ctypes.pointer(router), experts, count, gate, counts, activations, of_experts
    )
