"""What gives way when a device's memory runs out in the middle of a step: slots of experts."""

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
"""Given back beyond what was asked for: past the point where it failed, the same step will ask for more."""

_ALSO = ("CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory")
"""How libraries say that their own request for a device's memory was refused."""

_EITHER = ("CUDA error: out of memory", "CUBLAS_STATUS_NOT_INITIALIZED")
"""What is also said for other reasons: the first by CUDA of its own requests, as for the code of a kernel,
which it loads when that is first launched, and of a refusal to pin RAM while gigabytes of VRAM are free; the
second by cuBLAS, which sets itself up in each thread that first multiplies."""

FULL = 128 << 20
"""With less than that free, VRAM is taken for what lacks."""


class Shortage(NamedTuple):
    """A request for a device's memory that was refused."""

    nbytes: int
    """0 where the error does not say."""
    card: int | None
    """Number of the CUDA device; None where the error does not say."""


def shortage(error: BaseException) -> Shortage | None:
    """What lacked, if `error` says that a device's memory ran out; None for all other errors."""
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
    """Of those that this process uses: to ask another one takes some of its memory."""
    with contextlib.suppress(RuntimeError):
        cards = [card for card in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(card)]
        return any(torch.cuda.mem_get_info(card)[0] < FULL for card in cards)
    return False


class Relief:
    """Shrinks a device's tier when its memory ran out, and says so once each time.

    Slots do not come back before the model is loaded again: whoever took the memory may want it again, and a
    cache that grows and shrinks under an answer is worse than a small one.
    """

    def __init__(self, tier: Tier, arena: DeviceArena, before: Callable[[], None]) -> None:
        """`arena`: the tier's, as far as its memory is on devices. `before` is called first, each time."""
        self._tier = tier
        self._arena = arena
        self._before = before

    def __call__(self, lacking: Shortage) -> bool:
        """Whether anything was given back. Call between steps, when nothing of the tier is leased."""
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
