"""Choosing tokens for sparse attention (DeepSeek V3.2) a few queries at a time.

Its indexer scores every token for every query by each of its heads, in fp32: 2048 tokens behind 2048 others
take 4 GiB, twice 64 heads x 2048 x 4096 numbers, and all that is used is their sum over heads.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache
from typing import Any

import torch

from moe_local.offload.class_source import class_source
from moe_local.offload.engine.names import cache_name
from moe_local.offload.kernels.logits_trial import difference
from moe_local.offload.kernels.stand_in import set_class, stand_in

SCORES_BYTES = 128 * 2**20
"""What the scores of all heads may take for the queries of one piece."""
SHORTEST = 16
"""Queries in a piece at least: 16 behind 128 thousand tokens take 512 MiB for each of two results."""

logger = logging.getLogger(__name__)


def use_index_pieces(model: Any) -> None:
    """Let the indexers of a transformers model score the tokens of a prompt for a few queries at a time.

    Whether that changes nothing is found out by trying: see `difference`.
    """
    modules = [module for module in model.modules() if _is_indexer(module) and not hasattr(module, "numbers")]
    if not modules:
        return
    classes: list[Any] = [type(module) for module in modules]

    def change() -> None:
        for module, cls in zip(modules, classes, strict=True):
            set_class(module, in_pieces(cls))
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


def _is_indexer(module: Any) -> bool:
    cls: Any = type(module)
    return cls.__name__.endswith("Indexer") and ".update_indexer(" in class_source(cls)


@cache
def in_pieces(cls: Any) -> Any:
    """A subclass of an indexer's class that scores a few queries at a time: `least`, or as many as give
    `numbers` scores."""
    name, signature = cache_name(cls.forward), inspect.signature(cls.forward)

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(self, hidden_states, *args, **kwargs).arguments
        given.pop("self")
        memory, mask, tokens = given.get(name), given["attention_mask"], hidden_states.shape[1]
        piece = max(self.least, self.numbers // (self.n_heads * mask.shape[-1]))
        if memory is None or tokens <= piece or torch.is_grad_enabled():
            whole: torch.Tensor = cls.forward(self, hidden_states, *args, **kwargs)
            return whole
        # The keys of all tokens get their place, so that every piece finds those before it.
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


def _cut(value: Any, first: int, piece: int, tokens: int) -> Any:
    """What a piece gets of an argument: its tokens, the second dimension, of whatever has all of them."""
    if isinstance(value, tuple):
        return tuple(_cut(part, first, piece, tokens) for part in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == tokens:
        return value[:, first : first + piece]
    return value


class _Keys:
    """Stands for a cache: keys of a prompt, [B, S, D], of which a piece brings those from `first` on."""

    def __init__(self, keys: torch.Tensor, first: int) -> None:
        self._keys, self._first = keys, first

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """As a cache's. Keys of later pieces are not there yet; the mask leaves them out."""
        self._keys.narrow(1, self._first, indexer_key_states.shape[1]).copy_(indexer_key_states)
        return self._keys
