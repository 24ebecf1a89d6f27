"""Tokens that come one at a time; quantized weights, beside what they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from moe_local.offload.dense.linear import QuantizedLinear
from moe_local.offload.engine.kv_slab import probe_cache
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.modeling.names import cache_name


def one_by_one(hf: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] of tokens that come one at a time, in memory that the library writes in place."""
    kv = make_kv(hf, 1, 32, probe_cache(hf))
    kv.join()
    found = []
    with torch.no_grad():
        for place, token in enumerate(ids):
            options = {"position_ids": torch.tensor([[place]]), cache_name(hf.forward): kv.row(0)}
            found.append(hf(input_ids=torch.tensor([[token]]), **options).logits[0])
            kv.advance(0, 1)
    return torch.cat(found)


def quantize(plain: Iterable[nn.Module], modules: Iterable[Any], format: str) -> None:
    """Quantize the linear layers of `modules`, and give those of `plain` what the codes stand for."""
    for theirs, ours in zip(plain, modules, strict=True):
        for name, original in list(ours.named_children()):
            if isinstance(original, nn.Linear):
                linear = QuantizedLinear(original, format).eval()
                linear.weight = linear.quantized("weight", original.weight)
                setattr(ours, name, linear)
                getattr(theirs, name).weight = nn.Parameter(linear.decoded(torch.float32))
