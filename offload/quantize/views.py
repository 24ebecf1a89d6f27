"""Typed views of an expert's flat buffer, and the checks that every codec makes."""

from __future__ import annotations

import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize.layout import Layout, Segment

TORCH_DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


def segment_view(buffer: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The segment's numbers, in its dtype and shape, as a view of `buffer` (uint8, 1-D, any device)."""
    raw = buffer[segment.offset : segment.offset + segment.nbytes]
    return raw.view(TORCH_DTYPES[segment.dtype]).view(segment.shape)


def views_of(buffer: torch.Tensor, layout: Layout, name: str) -> dict[str, torch.Tensor]:
    """The segments of tensor `name`, by their parts' names, in buffer order; see `segment_view`."""
    return {segment.part: segment_view(buffer, segment) for segment in layout.parts(name)}


def zero_padding(buffer: torch.Tensor, layout: Layout) -> None:
    """Zero the bytes of `buffer` that belong to no segment, so that equal experts have equal bytes."""
    end = 0
    for segment in layout.segments:
        buffer[end : segment.offset].zero_()
        end = segment.offset + segment.nbytes
    buffer[end : layout.nbytes].zero_()


def copy_exactly(name: str, source: torch.Tensor, target: torch.Tensor, format: str) -> None:
    """Copy `source` into `target`, rounding to its dtype. Both have the same shape.

    Raises CheckpointError if a value is NaN or infinite, or finite and too large for the target's dtype.
    """
    target.copy_(source)
    if not target.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(target))).all()):
        return  # aminmax propagates NaN and, unlike isfinite, needs no copy of the tensor
    check_finite(name, source)
    raise CheckpointError(
        f"{name} has values up to {float(source.abs().max()):.4g}, above the largest {format} number "
        f'{torch.finfo(target.dtype).max:.4g}; use experts="bf16" or "fp32"'
    )


def check_finite(name: str, values: torch.Tensor) -> None:
    """Raises CheckpointError if one of `values`, of tensor `name`, is NaN or infinite."""
    bad = int(values.numel() - torch.isfinite(values).sum())
    if bad:
        kind = "NaN" if bool(torch.isnan(values).any()) else "infinite"
        raise CheckpointError(
            f"{name} has {bad} of {values.numel()} weights that are {kind}; "
            "the checkpoint is damaged, download it again"
        )
