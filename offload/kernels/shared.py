"""A layer's step that is shared: the device computes some experts while the host computes others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from moe_local.offload.kernels.contracts import Answers, LayerStep, Readable
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.tiers.device import Device, Waited
from moe_local.offload.tiers.small_pins import pinned_for

FLOAT = 4
INDEX = 8


class Staging:
    """A host buffer for copies from and to a device, reused by every layer; pinned for a CUDA device.

    Its user must make sure that earlier copies have ended before using it again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int, keep: int = 0) -> torch.Tensor:
        """uint8 [nbytes], whose first `keep` bytes are as after the previous call."""
        if nbytes > self._memory.numel():
            with torch.inference_mode(False):  # otherwise it could be written only in inference mode
                grown = pinned_for(self._device, torch.empty(2 * nbytes, dtype=torch.uint8))
            grown[:keep] = self._memory[:keep]
            self._memory = grown
        return self._memory[:nbytes]

    def bring(self, data: torch.Tensor) -> torch.Tensor:
        """uint8 [n] on the device -> a copy on the host. Blocks until the device's stream has run the
        copy."""
        here = self.reserve(data.numel())
        here.copy_(data, non_blocking=True)
        if data.is_cuda:
            torch.cuda.current_stream(data.device).synchronize()
        return here


class Unpacked(NamedTuple):
    numbers: list[int]
    hidden: torch.Tensor


def pack(numbers: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """int64 [n] and hidden [T, D] of any dtype in one uint8 tensor, to be copied at once."""
    return torch.cat([numbers.view(torch.uint8), hidden.contiguous().view(torch.uint8).flatten()])


def unpack(data: torch.Tensor, count: int, like: torch.Tensor) -> Unpacked:
    """The inverse of `pack`: `count` numbers, and a tensor `like` hidden, which is a view of `data`."""
    start = count * INDEX
    numbers = data[:start].view(torch.int64).tolist()
    return Unpacked(numbers, data[start:].view(like.dtype).view(like.shape))


class SharedStep:
    """A LayerStep that gives experts in RAM to `answers`, on the CPU, and all others to the device's step.

    The host's answers are copied to the device at once, on the compute stream, when `result` is called.
    `staging` holds them until the device has read them. So the next step that uses it must begin after a
    wait for the device, which every layer needs anyway to learn the router's choice.
    """

    def __init__(
        self,
        step: LayerStep,
        answers: Answers,
        x: torch.Tensor,
        routing: Routing,
        *,
        device: Device,
        staging: Staging,
        waited: Callable[[Waited], None],
    ) -> None:
        """`x` [T, D], on the device; `waited` is called with each wait of the device for the host."""
        self._step = step
        self._answers = answers
        self._x = x
        self._routing = routing
        self._device = device
        self._staging = staging
        self._waited = waited
        self._places: list[torch.Tensor] = []
        self._rows = 0

    def compute(self, group: Sequence[Readable]) -> None:
        if not group[0].on_host:
            self._step.compute(group)
            return
        idle = self._device.idle()
        row = FLOAT * self._x.shape[1]
        before = self._rows * row
        self._rows += sum(self._routing.tokens_of(readable.expert) for readable in group)
        memory = self._staging.reserve(self._rows * row, keep=before)
        out = memory[before:].view(torch.float32).view(-1, self._x.shape[1])
        self._places.append(self._answers.compute(group, out))
        self._waited(idle.end())

    def accept(self, places: torch.Tensor, answers: torch.Tensor) -> None:
        self._step.accept(places, answers)

    def result(self) -> torch.Tensor:
        if self._places:
            self._step.accept(*self._sent())
        return self._step.result()

    def _sent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The host's places and answers, copied to the device."""
        used = self._rows * FLOAT * self._x.shape[1]
        start = -(-used // INDEX) * INDEX
        memory = self._staging.reserve(start + self._rows * INDEX, keep=used)
        torch.cat(self._places, out=memory[start:].view(torch.int64))
        there = memory.to(self._x.device, non_blocking=True)
        answers = there[:used].view(torch.float32).view(self._rows, -1)
        return there[start:].view(torch.int64), answers
