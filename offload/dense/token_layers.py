"""Tokens' pass through consecutive decoder layers, their experts included, in one library call."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_local.offload.dense.attention_call import AttentionCall
from moe_local.offload.dense.guard import Guard
from moe_local.offload.dense.layer_part import (
    Part,
    attention_of,
    experts_of,
    guard_of,
    keeps_state,
    part_of,
    table_of,
)
from moe_local.offload.dense.layers_ahead import Ahead
from moe_local.offload.dense.mixer import mixer_of
from moe_local.offload.dense.places import Places, States, cache_of
from moe_local.offload.dense.token_calls import Call, version_of
from moe_local.offload.native import library as native
from moe_local.offload.native.library import WholeLayer, check, loaded_library
from moe_local.offload.system.interrupt import check as check_interrupt
from moe_local.offload.system.interrupt import deferred, is_deferred
from moe_local.offload.system.threads import kernel_threads

SHARED = ("position_embeddings", "past_key_values", "cache")
"""Arguments that all layers of a forward must have in common, where the trial looks on."""

FEWEST = 2
"""With fewer layers, TokenLayer's calls are as fast, unless a layer has a state or a shared expert."""


class Cut(NamedTuple):
    """A layer that cannot be computed together with those in front of it."""

    module: Any
    guard: Guard
    idle: bool
    """Whether the guard found its modules idle."""
    served: bool
    """Whether its experts had a table."""

    def stays(self, x: torch.Tensor) -> bool:
        """Whether nothing has happened, as far as can be seen, that would let the layer be computed now, for
        inputs like x [n, D]."""
        if not self.guard.unchanged() or self.guard.idle() is not self.idle:
            return False
        return not self.idle or (table_of(self.module, x) is not None) is self.served


class TokenLayers:
    """The library's call for decoder layers in a row, each computed as by its TokenLayer, with the same bits.

    transformers calls layers one after the other, and each time the experts' weights have swept what Python
    needs out of the caches, so that it takes longer than a layer's attention. So the call of the first layer
    computes all of them, and the others return what is there already. They do so only if they are called with
    the very output of the layer before, in which nothing was changed, and with arguments that mean what was
    expected. Otherwise the layer is computed by itself, which writes the same columns of the cache again, and
    so are those behind it. States change only when their layers are called. Only layers that were called are
    counted; choices of experts in others, which a forward left out or computed again, are taken back, at the
    latest when the first layer is called again.

    What modules are, and who depends on their calls, is looked at when the first layer is called. What a hook
    does to the parts of later layers during a forward has its effect on the next one. Layers that are called
    in another order than in the trial, all with the same rotary angles, are computed one by one; with angles
    of their own, none of them may be called before the first one.
    """

    def __init__(self, modules: Sequence[Any], above: Sequence[nn.Module]) -> None:
        """`modules`: consecutive decoder layers with a `_token_layer` each, whose `block` is not None.
        `above`: the modules that contain them. As long as one of these has other children than now, nothing
        is computed ahead, since layers may be called in another order."""
        self._modules = modules
        self._fewest = _fewest(modules)
        self._turning = next((n for n, module in enumerate(modules) if not keeps_state(module)), None)
        """The number of the first module that takes angles."""
        self._above = _all(Guard(module, []) for module in above)
        self._parts: list[Part] = []
        """Of the first modules, as many as can be computed together."""
        self._structs: ctypes.Array[WholeLayer] | None = None
        self._guard: Guard | None = None
        """Of all that the parts depend on; None if there are none."""
        self._cut: Cut | None = None
        """The first of the modules that is not among the parts."""
        self._dtype: torch.dtype | None = None
        """The dtype of the inputs that the parts are for; None: find them anew."""
        self._ahead: Ahead | None = None
        self._alone: weakref.ref[torch.Tensor] | None = None
        """An argument of the last forward in which a layer behind the first one was computed by itself."""

    @classmethod
    def join(cls, model: nn.Module, calls: Mapping[nn.Module, Call]) -> None:
        """Let those of the called modules that have a `_token_layer` and follow each other be computed
        together. `calls` are those of one forward of `model`, in order.

        The model owns the new objects, and the layers know them by weak references, so that no cycle keeps
        the weights of a model that nobody needs any more.
        """
        rows: list[list[nn.Module]] = []
        before: Call | None = None
        for module, call in calls.items():
            layer = getattr(module, "_token_layer", None)
            if layer is None or layer.block is None or experts_of(module) is None:
                before = None
                continue
            if before is None or not _follows(call, before):
                rows.append([])
            rows[-1].append(module)
            before = call
        for row in rows:
            if len(row) < _fewest(row):
                continue
            together = cls(row, _above(model, row))
            vars(model).setdefault("_token_layers", []).append(together)
            for number, module in enumerate(row):
                vars(module)["_token_layer"].among = (weakref.ref(together), number)

    def output(self, number: int, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """x [n, 1, D] -> layer `number`'s output [n, 1, D]; None: the layer has to be computed by itself."""
        ahead = self._ahead
        if number == 0 or (ahead is not None and not ahead.goes_on(self._modules, number, x, kwargs)):
            if ahead is not None:
                self._ahead = None
                ahead.give_up()
            ahead = self._compute(x, kwargs) if number == 0 else None
        if ahead is None:
            if number > 0:
                self._alone = _forward_of(kwargs)
            return None
        if number + 1 == len(ahead.outputs):
            self._ahead = None
        return ahead.take()

    def _compute(self, x: torch.Tensor, kwargs: dict[str, Any]) -> Ahead | None:
        """Compute as many layers as possible; None if they are too few."""
        check_interrupt()
        first = self._modules[0]
        known_not = self._cut is not None and not self._parts and x.is_contiguous()
        if known_not and self._are_known(x.view(-1, x.shape[-1])):
            return None
        where = first._token_layer.places(first, x, kwargs) if self._above.holds() else None
        if where is None:
            return None
        given = _forward_of(kwargs)
        if self._alone is not None and given is not None and self._alone() is given():
            return None  # a layer behind this one has had its turn, and must not be computed once more
        tokens = where.tokens
        rows = x.view(tokens, -1)
        turned = self._angles(x, kwargs, tokens)
        if not self._are_known(rows):
            if turned is None:
                return None  # which other layers take such angles cannot be found out now
            self._take(rows, kwargs)
        masks, places = self._places(x, where, kwargs)
        if turned is None:
            del masks[self._turning :], places[self._turning :]
        if len(places) < self._fewest:
            return None
        with torch.inference_mode(False):  # tensors of inference have no version
            y = torch.empty(len(places), *x.shape, dtype=x.dtype)
        ids = (ctypes.c_int64 * (tokens * sum(part.top_k for part in self._parts[: len(places)])))()
        sequences = (native.Sequence * (len(places) * tokens))(*(row for one in places for row in one.rows()))
        lib, threads = loaded_library(), kernel_threads()
        cache = weakref.ref(cache_of(kwargs))
        expected = [None if mask is None else weakref.ref(mask) for mask in masks]
        spans, angles = [one.span for one in places], kwargs.get("position_embeddings")
        numbers = tokens * sum(part.left for part in self._parts[: len(places)])
        left = None  # the states of the only layer, which is being called, may change at once
        if numbers and len(places) > 1:
            left = torch.empty(numbers, dtype=torch.float32, device="cpu")
        ahead = Ahead(self._parts, angles, cache, expected, spans, tokens, y.unbind(), ids, left)
        cos, sin = (one.data_ptr() for one in turned) if turned else (None, None)
        addresses = x.data_ptr(), cos, sin, sequences, tokens, y.data_ptr(), ids
        room = None if left is None else left.data_ptr()
        with nullcontext() if is_deferred() else deferred():  # so that nothing is counted and forgotten
            check(lib.moe_layers(self._structs, len(places), *addresses, room, threads))
            self._ahead = ahead
        if left is None and isinstance(where, States):
            where.note_change()
        return ahead

    def _angles(
        self, x: torch.Tensor, kwargs: dict[str, Any], tokens: int
    ) -> tuple[torch.Tensor, ...] | None:
        """The cos and sin that the library reads for so many tokens, none if no layer takes any; None if the
        first layer that does cannot serve x [n, 1, D]."""
        if self._turning is None:
            return ()
        attention = attention_of(self._modules[self._turning])
        mixer = mixer_of(attention)
        if not isinstance(mixer, AttentionCall):
            return None
        if self._turning and not mixer.suits(attention, x, kwargs):  # the first layer has its places already
            return None
        return mixer.read_angles(kwargs, tokens)

    def _places(
        self, x: torch.Tensor, first: Places | States, kwargs: dict[str, Any]
    ) -> tuple[list[torch.Tensor | None], list[Places | States]]:
        """Masks and places of the parts that can serve x [n, 1, D]; the first one's places are known.

        The mask of a layer is not known before its call: it is taken to be the first layer's, or, if that
        does not suit it (one has a window, or a state, the other not), the usual one."""
        masks: list[torch.Tensor | None] = []
        places: list[Places | States] = []
        layers = cache_of(kwargs).layers
        rows = x.view(first.tokens, -1)
        columns: Places | None = None
        """Those of the first layer that has any."""
        for part in self._parts:
            where: Places | States | None = first
            mask = kwargs.get("attention_mask")
            if places and part.net is not None:
                mask, where = None, part.net.states_ahead(part.layer_idx, x, kwargs)
            elif places:
                layer: Any = layers[part.layer_idx] if part.layer_idx < len(layers) else None
                where = None
                if hasattr(layer, "direct") and (where := layer.direct(mask)) is None:
                    mask = layer.usual_mask()
                    where = layer.direct(mask)
            table = part.experts.table(rows)
            if table is not part.table and table is not None:
                self._dtype = None
            if where is None or table is not part.table or not _alike(where, first, columns, x.dtype):
                break
            if columns is None and isinstance(where, Places):
                columns = where
            masks.append(mask)
            places.append(where)
        return masks, places

    def _are_known(self, x: torch.Tensor) -> bool:
        """Whether `_parts` are what `_take` would find now, as far as can be seen in little time."""
        if self._dtype is not x.dtype or (self._guard is not None and not self._guard.holds()):
            return False
        return self._cut is None or self._cut.stays(x)

    def _take(self, x: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Find out which of the modules can be computed together, for inputs like x [n, D] and angles like
        those among the arguments, whatever their caches and masks. The first module's mixer is ready."""
        parts: list[Part] = []
        guards: list[Guard] = []
        states: set[int] = set()
        self._cut = None
        turning = None if self._turning is None else self._modules[self._turning]
        for module in self._modules:
            guard = guard_of(module)
            idle = guard.idle()
            part = part_of(module, turning, x, kwargs) if idle else None
            if part is not None and part.net is not None:
                if part.layer_idx in states:
                    part = None  # it begins with what a layer before it makes of their state
                else:
                    states.add(part.layer_idx)
            if part is None:
                self._cut = Cut(module, guard, idle, table_of(module, x) is not None)
                break
            parts.append(part)
            guards.append(guard)
        self._parts, self._dtype = parts, x.dtype
        self._structs = (WholeLayer * len(parts))(*(part.struct for part in parts))
        self._guard = _all(guards) if guards else None

    def __reduce__(self) -> Any:
        """A copy of a model has none: what it contains would not be the copy's."""
        return type(None), ()


def _fewest(row: Sequence[Any]) -> int:
    """How many layers of a row have to be computed together for that to be of use."""
    return 1 if any(keeps_state(module) or module._token_layer.block.shared for module in row) else FEWEST


def _alike(
    where: Places | States, first: Places | States, columns: Places | None, dtype: torch.dtype
) -> bool:
    """Whether tokens of this dtype may go to these places as to those of the first layer, and, if they are
    columns, to those of the first layer with any."""
    if where is first:
        return True
    if where.tokens != first.tokens:
        return False
    if isinstance(where, States):
        return True
    alike = columns is None or (where.lasts, where.keys.shape[2]) == (columns.lasts, columns.keys.shape[2])
    return alike and where.fit(dtype)


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
    """Whether a layer was called with the output of the one before it, in which nothing was changed, and the
    same shared arguments."""
    given = call.args[0] if len(call.args) == 1 else None
    alike = all(call.kwargs.get(name) is before.kwargs.get(name) for name in SHARED)
    unchanged = given is before.output and version_of(given) == before.version
    return given is not None and unchanged and alike


def _forward_of(kwargs: dict[str, Any]) -> weakref.ref[torch.Tensor] | None:
    """What tells one forward from another, in which other angles are made."""
    angles = kwargs.get("position_embeddings")
    if isinstance(angles, tuple):
        angles = angles[0]
    return weakref.ref(angles) if torch.is_tensor(angles) else None
