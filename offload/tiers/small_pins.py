"""Small tensors in pinned memory, for asynchronous copies; in pageable memory if pinning is refused."""

from __future__ import annotations

import logging

import torch

from moe_local.cache.errors import first_line

logger = logging.getLogger(__name__)

_refused = False
"""Whether the system has refused once; it is not asked again, since each refusal takes time."""


def pinned_for(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, for copies to or from this device: as `pinned` for CUDA's, itself for others."""
    return pinned(tensor) if device.type == "cuda" else tensor


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on this device. The host does not wait for the copy, which is in the order of the current
    stream."""
    return pinned_for(device, tensor).to(device, non_blocking=True)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a CPU tensor in pinned memory; the tensor itself, with one warning, if that is refused.

    On WSL and Windows, a process that was refused pinned memory for its experts may be refused any from then
    on. Copies from pageable memory block the host, but are correct.
    """
    global _refused
    if _refused:
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        _refused = True
        logger.warning("small copies to the GPU hold the host up: no memory is pinned: %s", first_line(error))
        return tensor
