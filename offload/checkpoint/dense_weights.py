"""Weights that transformers cannot read by itself, given to its loader one at a time, as it asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.shards import Shards
from moe_local.offload.checkpoint.weights import Weight


class DenseWeights:
    """A checkpoint's weights, dequantized when they are read.

    transformers' loader takes a mapping whose values it indexes with `[...]` when it wants a tensor; what
    an experts module would have had it never asks for, since nothing in the model is left to take it.
    """

    def __init__(self, shards: Shards, weights: Mapping[str, Weight], *, complete: bool = False) -> None:
        """`complete`: the loader finds no safetensors beside these."""
        self.complete = complete
        self._shards = shards
        self._weights = weights
        self.failures: list[CheckpointError] = []
        """What went wrong. The loader would put it in words of its own."""

    def state_dict(self) -> dict[str, Any]:
        """By key; reads nothing."""
        return {key: _Unread(self, weight) for key, weight in self._weights.items()}

    def read(self, weight: Weight) -> torch.Tensor:
        """New memory, on the CPU: float32 if it was quantized, else as stored. Any thread may call it.

        Raises CheckpointError if a shard cannot be read or what it stores is no weight.
        """
        try:
            weight.check(self._shards.remedy)
            (stored,) = self._shards.read([weight.parts])
            return weight.decode(stored)
        except CheckpointError as error:
            self.failures.append(error)
            raise


class _Unread:
    """One weight that has not been read."""

    def __init__(self, source: DenseWeights, weight: Weight) -> None:
        self._source = source
        self._weight = weight

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        return self._source.read(self._weight)
