"""The reference path: weights are decoded to the compute dtype, then multiplied by torch's own linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F


def reference_linear(
    weights: Mapping[str, torch.Tensor], has_bias: bool
) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """A linear function over decoded weights: matrices [out, in] and, if `has_bias`, vectors "<name>_bias"
    [out]."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[name], weights[f"{name}_bias"] if has_bias else None)

    return linear
