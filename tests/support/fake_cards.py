"""Several fake cards, all in RAM, to test CUDA graphs of models that are split over cards.

They are as strict as CUDA: an operation on tensors of two cards raises, except a copy outside of a capture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_local.offload.gpu.card_moves import CardMoves


class FakeCards(TorchDispatchMode):
    """Tracks which card every tensor is on; None if none of the tensors it was computed from is on a card.

    `graphs`: the FakeGraphs of each card; tensors in its pool are on that card. A device names a card.
    """

    def __init__(self, graphs: Mapping[torch.device, Any]) -> None:
        super().__init__()
        self.graphs = graphs
        self._storages: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def put(self, card: torch.device, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = StorageWeakRef(storage), card

    def card_of(self, tensor: torch.Tensor) -> torch.device | None:
        for card, graphs in self.graphs.items():
            if graphs.pool.holds(tensor):
                return card
        known = self._storages.get(tensor.untyped_storage().data_ptr())
        return None if known is None or known[0].expired() else known[1]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        cards = list(dict.fromkeys(card for card in map(self.card_of, given) if card is not None))
        copies = function._schema.name == "aten::copy_" and not any(g.recorder for g in self.graphs.values())
        if len(cards) > 1 and not copies:
            raise RuntimeError(f"Expected all tensors to be on the same device: {function} of {cards}")
        results = function(*args, **kwargs)
        asked = kwargs.get("device")
        card = asked if asked in self.graphs else cards[0] if cards else None
        if card is not None:
            known = [x for x in tree_leaves(results) if torch.is_tensor(x) and self.card_of(x) is None]
            self.put(card, known)
        return results


class FakeCardMoves(CardMoves):
    """The CardMoves of a model whose weights are on FakeCards; `moved` counts the moved tensors."""

    def __init__(self, cards: FakeCards, model: nn.Module, places: Mapping[str, torch.device]) -> None:
        super().__init__(model, places, next(iter(cards.graphs)))
        self.moved = 0
        self._cards = cards
        for name, card in places.items():
            module = model.get_submodule(name)
            cards.put(card, [*module.parameters(), *module.buffers()])

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        brought = super()._begin(module, args, kwargs)
        self._home = self._first  # the inputs' own device is always "cpu", which is no card
        return brought

    def is_elsewhere(self, tensor: torch.Tensor, card: torch.device) -> bool:
        return self._cards.card_of(tensor) not in (None, card)

    def move(self, tensors: Any, card: torch.device) -> list[torch.Tensor]:
        self.moved += len(tensors)
        return [torch.empty_like(tensor, device=card).copy_(tensor) for tensor in tensors]
