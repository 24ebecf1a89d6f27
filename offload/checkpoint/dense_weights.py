"""Gives transformers' loader weights that it cannot read by itself, one at a time, as it asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.shards import Shards
from moe_local.offload.checkpoint.weights import Weight


class DenseWeights:
    """A checkpoint's weights, dequantized when they are read.

    Transformers' loader takes a mapping whose values it indexes with `[...]` when it wants a tensor. It never
    asks for the weights of routed experts, since the model has no parameters for them any more.
    """

    def __init__(self, shards: Shards, weights: Mapping[str, Weight], *, complete: bool = False) -> None:
        """`complete`: the loader gets only these weights and no safetensors files (for GGUF)."""
        self.complete = complete
        self._shards = shards
        self._weights = weights
        self.failures: list[CheckpointError] = []
        """Errors of `read`, kept because the loader replaces them with errors of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Key -> an object that reads its weight when it is indexed."""
        return {key: _Unread(self, weight) for key, weight in self._weights.items()}

    def read(self, weight: Weight) -> torch.Tensor:
        """Read a weight into new memory on the CPU: float32 if it was quantized, else in its stored dtype.

        Any thread may call this. Raises CheckpointError if a shard or its weight's format cannot be read.
        """
        try:
            weight.check(self._shards.remedy)
            (stored,) = self._shards.read([weight.parts])
            return weight.decode(stored)
        except CheckpointError as error:
            self.failures.append(error)
            raise


class _Unread:
    """A weight that is read when it is indexed."""

    def __init__(self, source: DenseWeights, weight: Weight) -> None:
        self._source = source
        self._weight = weight

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        return self._source.read(self._weight)
