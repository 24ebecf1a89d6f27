"""Which GPUs PyTorch can compute on, and what is said where there is one that it cannot use."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from functools import cache

import torch

logger = logging.getLogger("moe_local")


@cache
def unusable(index: int) -> str | None:
    """Why torch's own kernels do not run on a CUDA device, in words; None: they do, or nobody knows.

    torch names every device that the driver has. But a build has kernels for some generations only: PyPI's
    for CUDA 13 begin at compute capability 7.5, and the first operation fails on a GTX 1080.
    """
    if torch.version.cuda is None:  # ROCm's names of architectures say nothing of capabilities
        return None
    built = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(index)
    if not built or runs_on(capability, built):
        return None
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, and "
        f"PyTorch {torch.__version__} has kernels for {', '.join(built)} only"
    )


def runs_on(capability: tuple[int, int], built: Iterable[str]) -> bool:
    """Whether a build for these architectures ("sm_86", "compute_90") has kernels for a device.

    Machine code runs on its generation from its own number on; what is to be compiled by the driver, on all
    later ones. With an "a" behind it, it is for exactly one device.
    """
    for name in built:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if parts is None:
            return True  # a kind of name that did not exist when this was written
        number = int(parts[2]), int(parts[3])
        same = capability[0] == number[0] and capability >= number
        later = parts[1] == "compute" and not parts[4] and capability >= number
        if capability == number or (parts[4] != "a" and same) or later:
            return True
    return False


def usable_cards() -> list[int]:
    """Numbers of the CUDA devices that torch can compute on; others are named once, in a warning."""
    if not torch.cuda.is_available():
        return []
    cards = []
    for index in range(torch.cuda.device_count()):
        reason = unusable(index)
        if reason is None:
            cards.append(index)
        else:
            _warn(f"cuda:{index} is left out: {reason}; {REMEDY}")
    return cards


REMEDY = "install a PyTorch that is built for it (https://pytorch.org/get-started)"


def tell_slow(devices: Iterable[torch.device], dtype: torch.dtype) -> None:
    """Say once of each card among them that it has no units for the model's dtype, and which has some.

    Turing knows bf16 only as fp32 that is rounded. It is not turned to fp16 unasked: large activations of
    some models would become infinite.
    """
    if dtype != torch.bfloat16 or torch.version.cuda is None:
        return
    for card in devices:
        if card.type != "cuda":
            continue
        capability = torch.cuda.get_device_capability(card)
        if capability < (8, 0):
            _warn(
                f"{torch.cuda.get_device_name(card)} (compute capability {capability[0]}.{capability[1]}) "
                "computes bf16 without its matrix units, which makes long prompts slow; --dense fp16 uses "
                "them, and is right as long as no activation of the model exceeds 65504"
            )


def tell_unused() -> None:
    """Say once that the CPU computes though there is an NVIDIA GPU, which nobody has hidden on purpose."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    found = _unused()
    if found is not None:
        _warn(f"experts are computed on the CPU: {found[0]}; {found[1]}")


@cache
def _unused() -> tuple[str, str] | None:
    from moe_local.offload.doctor.graphics import absence, has_nvidia_hardware

    return absence() if has_nvidia_hardware() else None


@cache
def _warn(message: str) -> None:
    logger.warning("%s", message)
