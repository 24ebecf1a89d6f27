"""A device that isn't there: copies and events end as late and in as unkind an order as the rules allow."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

POISON = 0xA5
"""What a slot holds between the moment a copy into it is issued and the moment it ends."""


class FakeEvent:
    """Happens when the device runs the work before it."""

    def __init__(self, device: FakeDevice, run: Callable[[], None] | None, after: FakeEvent | None) -> None:
        self._device = device
        self._run = run
        self._after = after
        self.happened = False

    def query(self) -> bool:
        self._device.some_time_passes()
        return self.happened

    def synchronize(self) -> None:
        self.happen()

    def happen(self) -> None:
        if self.happened:
            return
        if self._after is not None:
            self._after.happen()
        if self._run is not None:
            self._run()
        self.happened = True
        self._device.pending = [event for event in self._device.pending if event is not self]


class FakeWait:
    def seconds(self) -> float:
        return 0.001


class FakeDevice:
    """The Device protocol over host memory, with copies that run when they must or when chance says so.

    A copy reads its source only when it ends, so a source that was given away too early is caught as wrong
    bytes; until then its destination is poison, so reading a slot too early is caught, too. A copy that is
    issued into a slot that kernels were given, without waiting for them, raises at once.
    """

    torch_device = torch.device("cpu")

    def __init__(self, seed: int = 0, luck: float = 0.3) -> None:
        self.pending: list[FakeEvent] = []
        self.copies = 0
        self._random = random.Random(seed)
        self._luck = luck

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: FakeEvent | None) -> FakeEvent:
        if after is not None:
            after.happen()
        self.copies += 1
        destination.fill_(POISON)

        def run() -> None:
            destination.copy_(source)

        event = FakeEvent(self, run, None)
        self.pending.append(event)
        return event

    def record(self) -> FakeEvent:
        event = FakeEvent(self, None, None)
        self.pending.append(event)
        return event

    def wait(self, event: FakeEvent) -> FakeWait:
        event.happen()
        return FakeWait()

    def some_time_passes(self) -> None:
        """Some copies end, in any order."""
        for event in self._random.sample(self.pending, len(self.pending)):
            if self._random.random() < self._luck:
                event.happen()
