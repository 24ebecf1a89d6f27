"""Small tensors in pinned memory, for copies that nobody waits for; or in any, where none is pinned."""

from __future__ import annotations

import logging

import torch

from moe_local.cache.errors import first_line

logger = logging.getLogger(__name__)

_refused = False
"""Whether the system has refused once: it is not asked again, since each refusal takes time."""


def pinned_for(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, for copies to or from this device: as `pinned` for CUDA's, itself for others."""
    return pinned(tensor) if device.type == "cuda" else tensor


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor on the CPU in pinned memory; itself where that is refused, which is said once.

    In WSL and Windows a process that has been refused memory for its experts may be refused any from then on.
    Copies from memory that is not pinned hold the host up, and are right.
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
