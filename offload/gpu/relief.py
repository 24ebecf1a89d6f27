"""Frees slots of experts when a device runs out of memory in the middle of a step."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from moe_local.cache.keys import format_bytes, parse_bytes
from moe_local.offload.tiers.device import Device
from moe_local.offload.tiers.device_arena import DeviceArena
from moe_local.offload.tiers.shrink import shrink
from moe_local.offload.tiers.tiers import Tier

logger = logging.getLogger(__name__)

MARGIN = 256 << 20
"""Bytes freed beyond the failed request: the same step will ask for more after that point."""

_ALSO = ("CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory")
"""Messages of libraries whose own request for device memory was refused."""

_EITHER = ("CUDA error: out of memory", "CUBLAS_STATUS_NOT_INITIALIZED")
"""Messages that also have other reasons. CUDA gives the first for its own requests, such as the code of a
kernel that is launched for the first time, but also if RAM cannot be pinned while gigabytes of VRAM are free.
cuBLAS gives the second, when a thread first multiplies and its handle cannot be set up."""

FULL = 128 << 20
"""With fewer bytes free, such a message is taken to mean VRAM."""


class Shortage(NamedTuple):
    """A refused request for device memory."""

    nbytes: int
    """0 if the error does not say."""
    card: int | None
    """Index of the CUDA device; None if the error does not say."""


def shortage(error: BaseException) -> Shortage | None:
    """The Shortage, if `error` says that device memory ran out; None for all other errors."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and not any(words in text for words in _ALSO):
        unclear = any(words in text for words in _EITHER)
        return Shortage(0, None) if unclear and _some_card_is_full() else None
    size = re.search(r"Tried to allocate ([\d.]+) (bytes|[KMGT]iB)", text)
    card = re.search(r"GPU (\d+)", text)
    nbytes = 0
    if size is not None:
        nbytes = parse_bytes(size[1] + ("B" if size[2] == "bytes" else size[2]))
    return Shortage(nbytes, None if card is None else int(card[1]))


def _some_card_is_full() -> bool:
    """Only of devices that this process uses: asking another one would take some of its memory."""
    with contextlib.suppress(RuntimeError):
        cards = [card for card in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(card)]
        return any(torch.cuda.mem_get_info(card)[0] < FULL for card in cards)
    return False


class Relief:
    """Shrinks a device's tier when its memory has run out, and logs a warning each time.

    The slots come back only when the model is loaded again: whoever took the memory may want it again, and a
    cache that grows and shrinks during an answer is worse than a small one.
    """

    def __init__(self, tier: Tier, arena: DeviceArena, before: Callable[[], None]) -> None:
        """`arena`: the device part of the tier's memory. `before` is called first, each time."""
        self._tier = tier
        self._arena = arena
        self._before = before

    def __call__(self, lacking: Shortage) -> bool:
        """Free memory; whether that worked. Call between steps, when nothing of the tier is leased."""
        given = False
        self._before()
        for device in self._tier.devices:
            if lacking.card is None or device.torch_device.index in (None, lacking.card):
                given |= self._shrink(device, lacking.nbytes + MARGIN)
        return given

    def _shrink(self, device: Device, nbytes: int) -> bool:
        before = self._slots(device)
        freed = shrink(self._tier, self._arena, nbytes, device)
        if freed:
            others = device.taken_by_others()
            logger.warning(
                "VRAM ran out on %s: kept %s of %s experts a layer, gave %s back%s; "
                "load the model again to have them all",
                device.torch_device,
                _range(self._slots(device)),
                _range(before),
                format_bytes(freed),
                "" if others is None else f"; other programs and CUDA itself take {format_bytes(others)}",
            )
        return freed > 0

    def _slots(self, device: Device) -> list[int]:
        cache = self._tier.cache
        return [cache.slots(at) for at in range(cache.layers) if self._tier.device_of(at) is device]


def _range(counts: Iterable[int]) -> str:
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"
