"""Which GPUs PyTorch can compute on, and warnings about those that it cannot use."""

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
    """Why torch's own kernels do not run on a CUDA device, in words; None if they do, or that is unknown.

    torch lists every device of the driver, but a build has kernels for some generations only: PyPI's builds
    for CUDA 13 start at compute capability 7.5, so the first operation fails on a GTX 1080.
    """
    if torch.version.cuda is None:  # ROCm's architecture names are not compute capabilities
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

    Machine code ("sm") runs on devices of its major version from its own minor version on; code that the
    driver compiles ("compute") runs on all later ones. A suffix restricts either: "a" to one capability, "f"
    to its major version.
    """
    for name in built:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if parts is None:
            return True  # a kind of name that is newer than this code
        number = int(parts[2]), int(parts[3])
        same = capability[0] == number[0] and capability >= number
        later = parts[1] == "compute" and not parts[4] and capability >= number
        if capability == number or (parts[4] != "a" and same) or later:
            return True
    return False


def usable_cards() -> list[int]:
    """Indices of the CUDA devices that torch can compute on; the others are named once, in a warning."""
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
    """Warn once about each card among them that has no units for the model's dtype, and name a dtype it has.

    Turing only emulates bf16, in fp32. Models are not switched to fp16 unasked, since large activations of
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
    """Warn once that the CPU computes although there is an NVIDIA GPU that was not hidden on purpose."""
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
