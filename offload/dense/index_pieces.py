"""Choosing tokens for sparse attention (DeepSeek V3.2 and V4) a few queries at a time.

The indexer scores every token for every query with each of its heads, in fp32: for 2048 tokens after 2048
others that takes 4 GiB, twice 64 heads x 2048 x 4096 numbers, of which only the sum over heads is used.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from moe_local.offload.dense.logits_trial import difference
from moe_local.offload.modeling.class_source import class_source
from moe_local.offload.modeling.names import cache_name
from moe_local.offload.modeling.stand_in import set_class, stand_in

SCORES_BYTES = 32 * 2**20
"""Bytes that the scores of all heads may take for the queries of one piece."""
SHORTEST = 16
"""Fewest queries in a piece: 16 queries after 128 thousand tokens take 512 MiB for each of two results."""

SCORED = ["self", "q", "compressed_kv", "hidden_states"]

logger = logging.getLogger(__name__)


def use_index_pieces(model: Any) -> None:
    """Let the indexers of a transformers model score the tokens of a prompt for a few queries at a time.

    A trial finds out whether that leaves the model's logits unchanged: see `difference`.
    """
    left = [module for module in model.modules() if not hasattr(module, "numbers")]
    makers = [(module, make) for module in left if (make := _maker(module)) is not None]
    if not makers:
        return
    modules = [module for module, _ in makers]
    classes: list[Any] = [type(module) for module in modules]

    def change() -> None:
        for (module, make), cls in zip(makers, classes, strict=True):
            set_class(module, make(cls))
            module.numbers, module.least = 0, 2

    reason = difference(model, change)
    for module, cls in zip(modules, classes, strict=True):
        if reason is None:
            module.numbers, module.least = SCORES_BYTES // 4, SHORTEST
        else:
            set_class(module, cls)
            del module.numbers, module.least
    if reason is not None:
        logger.info("tokens are chosen for all queries of a prompt at once: %s", reason)


def _maker(module: Any) -> Callable[[Any], Any] | None:
    """What makes, of the module's class, one that scores in pieces; None if the module does not score."""
    cls: Any = type(module)
    if cls.__name__.endswith("Indexer") and ".update_indexer(" in class_source(cls):
        return in_pieces
    if cls.__name__.endswith("IndexerScorer") and [*inspect.signature(cls.forward).parameters] == SCORED:
        return scores_in_pieces
    return None


@cache
def in_pieces(cls: Any) -> Any:
    """A subclass of an indexer's class that scores a few queries at a time: as many as give `numbers` scores,
    but at least `least`."""
    name, signature = cache_name(cls.forward), inspect.signature(cls.forward)

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(self, hidden_states, *args, **kwargs).arguments
        given.pop("self")
        memory, mask, tokens = given.get(name), given["attention_mask"], hidden_states.shape[1]
        piece = max(self.least, self.numbers // (self.n_heads * mask.shape[-1]))
        if memory is None or tokens <= piece or torch.is_grad_enabled():
            whole: torch.Tensor = cls.forward(self, hidden_states, *args, **kwargs)
            return whole
        # Reserve room for the keys of all tokens, so that every piece finds those of the pieces before it.
        keys = memory.update_indexer(
            hidden_states.new_zeros(len(hidden_states), tokens, self.head_dim), self.layer_idx
        )
        chosen = []
        for first in range(0, tokens, piece):
            part = {key: _cut(value, first, piece, tokens) for key, value in given.items()}
            part[name] = _Keys(keys, keys.shape[1] - tokens + first)
            chosen.append(cls.forward(self, **part))
        return torch.cat(chosen, dim=1)

    return stand_in(cls, in_pieces, forward)


@cache
def scores_in_pieces(cls: Any) -> Any:
    """The same for the scoring part of DeepSeek-V4's indexer, which has no cache of its own: queries q
    [B, S, H, D], compressed keys [B, T, D] and hidden states [B, S, .] -> [B, S, T]."""

    def forward(
        self: Any, q: torch.Tensor, compressed_kv: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        piece = max(self.least, self.numbers // (q.shape[2] * max(1, compressed_kv.shape[1])))
        if q.shape[1] <= piece or torch.is_grad_enabled():
            whole: torch.Tensor = cls.forward(self, q, compressed_kv, hidden_states)
            return whole
        pairs = zip(q.split(piece, dim=1), hidden_states.split(piece, dim=1), strict=True)
        return torch.cat([cls.forward(self, few, compressed_kv, hidden) for few, hidden in pairs], dim=1)

    return stand_in(cls, scores_in_pieces, forward)


def _cut(value: Any, first: int, piece: int, tokens: int) -> Any:
    """A piece's part of an argument: tensors are cut if their second dimension is that of all tokens."""
    if isinstance(value, tuple):
        return tuple(_cut(part, first, piece, tokens) for part in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == tokens:
        return value[:, first : first + piece]
    return value


class _Keys:
    """Takes the cache's place for one piece: a prompt's keys, [B, S, D], to be written from `first` on."""

    def __init__(self, keys: torch.Tensor, first: int) -> None:
        self._keys, self._first = keys, first

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Write the piece's keys and return all. Keys of later pieces are still zero; the mask hides them."""
        self._keys.narrow(1, self._first, indexer_key_states.shape[1]).copy_(indexer_key_states)
        return self._keys
