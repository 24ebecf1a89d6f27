"""Moves the inputs of a model's modules between cards, for a model that is spread over several."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import recursively_apply
from torch import nn

_NAME = "_card_moves"


class Mover(Protocol):
    """Moves tensors to another card. While a Recording is attached, it does so instead of CardMoves."""

    def move(self, tensors: Sequence[torch.Tensor], card: torch.device) -> list[torch.Tensor]:
        """The tensors, on `card`."""


class CardMoves:
    """Moves a module's inputs to the card of its weights, and the model's output to the card of its inputs.

    Replaces the hooks of accelerate, with which a model on several cards is loaded. Those check the inputs of
    every submodule, which costs the host microseconds each, and move masks and rotary embeddings again for
    every layer. Here only the modules of the device map are hooked, and keyword arguments, which are the same
    for every layer, are moved once per forward. So a capture meets few moves, and sees all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, torch.device],
        first: torch.device,
        skip: Collection[str] = (),
    ) -> None:
        """`places`: module name -> card, for all modules with weights; `first`: the card of the embeddings.
        `skip`: names of keyword arguments that are never moved. The model's hooks keep this object alive."""
        self.seam: Mover | None = None
        """Moves tensors instead of this object while a forward is captured; set and reset by the capture."""
        self._first = first
        self._skip = frozenset(skip)
        self._home = self._first
        """The device of the caller's tensors."""
        self._moved: dict[tuple[int, torch.device], tuple[weakref.ref[torch.Tensor], Any]] = {}
        """(id of a tensor, card) -> the tensor, and its copy on that card, in this forward."""
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)
        for name, card in places.items():
            module = model.get_submodule(name)
            if next(module.parameters(), None) is not None:
                hook = functools.partial(self._bring, card)
                module.register_forward_pre_hook(hook, with_kwargs=True)

    def is_elsewhere(self, tensor: torch.Tensor, card: torch.device) -> bool:
        """Whether the tensor has to be moved for a module on `card`."""
        return tensor.device != card

    def move(self, tensors: Sequence[torch.Tensor], card: torch.device) -> list[torch.Tensor]:
        """See Mover. Does not wait for a device if both ends are on one."""
        return [tensor.to(card) for tensor in tensors]

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._moved.clear()
        given = _tensors((args, kwargs))
        self._home = given[0].device if given else self._first
        return self._bring(self._first, module, args, kwargs)

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        try:
            return None if output is None else self._on(output, self._home)
        finally:
            self._moved.clear()

    def _bring(self, card: torch.device, module: nn.Module, args: Any, kwargs: Any) -> Any:
        staying = {name: value for name, value in kwargs.items() if name in self._skip}
        given = args, {name: value for name, value in kwargs.items() if name not in self._skip}
        brought = self._on(given, card, again=_tensors(given[1]))
        return None if brought is given else (brought[0], {**brought[1], **staying})

    def _on(self, given: Any, card: torch.device, again: Sequence[torch.Tensor] = ()) -> Any:
        """`given` with all its tensors on the card; `given` itself if they are there. Copies of tensors in
        `again` are kept for other modules of this forward, which will be given the same ones."""
        away = {id(tensor): tensor for tensor in _tensors(given) if self.is_elsewhere(tensor, card)}
        if not away:
            return given
        there = {number: self._known(tensor, card) for number, tensor in away.items()}
        new = [away[number] for number, known in there.items() if known is None]
        if new:
            mover = self if self.seam is None else self.seam
            there |= {id(old): moved for old, moved in zip(new, mover.move(new, card), strict=True)}
        for tensor in again:
            if id(tensor) in away:
                self._moved[id(tensor), card] = weakref.ref(tensor), there[id(tensor)]
        return recursively_apply(lambda tensor: there.get(id(tensor), tensor), given)

    def _known(self, tensor: torch.Tensor, card: torch.device) -> torch.Tensor | None:
        known = self._moved.get((id(tensor), card))
        return known[1] if known is not None and known[0]() is tensor else None


def _tensors(given: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if torch.is_tensor(given):
        return [given]
    if isinstance(given, tuple | list):
        return [tensor for part in given for tensor in _tensors(part)]
    if isinstance(given, Mapping):
        return [tensor for part in given.values() for tensor in _tensors(part)]
    return []


def move_between_cards(model: Any, device_map: Mapping[str, str]) -> None:
    """Replace the accelerate hooks, with which a transformers model was loaded, by CardMoves."""
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        forward = vars(module).get("forward")  # left by the removal; would hide a new class's
        if forward is not None and getattr(forward, "__func__", None) is type(module).forward:
            del module.forward
    places = {name: torch.device(card) for name, card in device_map.items()}
    first = model.get_input_embeddings().weight.device
    setattr(model, _NAME, CardMoves(model, places, first, model._skip_keys_device_placement or ()))


def moves_of(model: Any) -> CardMoves | None:
    """The CardMoves of a model; None if it lies on one device."""
    found: CardMoves | None = getattr(model, _NAME, None)
    return found
