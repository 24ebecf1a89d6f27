"""Measures how each format changes one expert's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.kernels.reference import reference_linear
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec


class Errors(NamedTuple):
    """Errors of one expert, per use on average."""

    energy: float
    """Squared norm of the expert's weighted output."""
    by_format: dict[str, float]
    """Squared norm of the change of that output by each format."""


def expert_errors(
    math: OffloadedExperts,
    specs: Sequence[TensorSpec],
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    weights: torch.Tensor,
    formats: Sequence[str],
    device: torch.device,
) -> Errors:
    """The errors of an expert with these tensors, in the checkpoint's precision, on inputs x [N, D].

    Its outputs are multiplied by weights [N]. Computed in fp32 on `device`. Raises CheckpointError as codecs
    do.
    """
    x, weights = x.to(device, torch.float32), weights.to(device, torch.float32)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    exact = _answers(math, {name: tensor.float() for name, tensor in tensors.items()}, x)
    scale = weights.square() / max(1, len(x))
    found = {}
    for name in formats:
        codec = codec_for(name)
        layout = codec.layout(specs)
        buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        codec.encode(tensors, layout, buffer)
        decoded = codec.decode(buffer.to(device), layout, torch.float32)
        changed = _answers(math, decoded, x) - exact
        found[name] = float((changed.square().sum(-1) * scale).sum())
    return Errors(float((exact.square().sum(-1) * scale).sum()), found)


def _answers(math: OffloadedExperts, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """[N, D] -> [N, D]: the expert alone, without what some models do to the sum of experts afterwards."""
    linear = reference_linear(weights, math.has_bias)
    return linear(math.activate(linear(x, "gate_up_proj" if math.has_gate else "up_proj")), "down_proj")
