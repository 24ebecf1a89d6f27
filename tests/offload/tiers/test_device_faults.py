"""A device that fails, at each call that the store makes of it and at every moment: once, or for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.tiers.shrink import shrink
from support.fake_device import FakeDevice, FakeEvent
from support.variants import others_slow

Make = Callable[..., Any]
LAYERS, EXPERTS = 3, 8
ALL = list(range(EXPERTS))
BUDGET = 1 << 20

FAULTS: dict[str, Callable[[], Exception]] = {
    "a lost device": lambda: RuntimeError("CUDA error: unspecified launch failure\nand more"),
    "memory refused": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    "no memory left": MemoryError,
}
CALLS = ("copy", "record", "wait", "query", "synchronize", "idle", "seconds", "allocate", "move")


class FailingDevice(FakeDevice):
    """Fails on order: the n-th call from now on of one kind, or all calls from that one on."""

    def __init__(self, seed: int = 0, luck: float = 0.3, *, lazy: bool = False) -> None:
        super().__init__(seed, luck, lazy=lazy)
        self.call, self.countdown, self.for_good, self.happened = "", 0, False, 0
        self.fault: Callable[[], Exception] = RuntimeError

    def order(self, call: str, fault: Callable[[], Exception], countdown: int, for_good: bool) -> None:
        self.call, self.fault, self.countdown, self.for_good = call, fault, countdown, for_good
        self.happened = 0

    def cancel(self) -> None:
        self.call = ""

    def now(self, call: str) -> None:
        gone = self.for_good and self.happened > 0 and self.call != ""
        if call == self.call:
            self.countdown -= 1
        elif not gone:
            return
        if gone or self.countdown == 0:
            self.happened += 1
            raise self.fault()

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.now("allocate")
        return super().allocate(nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: FakeEvent | None) -> FakeEvent:
        self.now("copy")
        return self._failing(super().copy(destination, source, after))

    def move(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.now("move")
        super().move(destination, source)

    def record(self) -> FakeEvent:
        self.now("record")
        return self._failing(super().record())

    def wait(self, event: FakeEvent) -> Any:
        self.now("wait")
        waited = super().wait(event)
        seconds = waited.seconds

        def timed() -> float:
            self.now("seconds")
            return seconds()

        waited.seconds = timed  # type: ignore[method-assign]
        return waited

    def idle(self) -> Any:
        self.now("idle")
        return super().idle()

    def _failing(self, event: FakeEvent) -> FakeEvent:
        query, synchronize, seconds = event.query, event.synchronize, event.seconds

        def called(call: str, real: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                self.now(call)
                return real()

            return run

        event.query = called("query", query)  # type: ignore[method-assign]
        event.synchronize = called("synchronize", synchronize)  # type: ignore[method-assign]
        event.seconds = called("seconds", seconds)  # type: ignore[method-assign]
        return event


def absent(rig: Any, layer: int) -> list[int]:
    """Two that have to be brought."""
    return [e for e in ALL if rig.tier.cache.slot_of(layer, e) is None][:2]


def decode(rig: Any) -> None:
    for layer in range(LAYERS):
        rig.step(layer, absent(rig, layer))


def waves(rig: Any) -> None:
    rig.step(1, ALL)


def guessing(rig: Any) -> None:
    for layer in range(LAYERS):
        target = (layer + 1) % LAYERS

        def guess(target: int = target) -> None:
            rig.store.prefetch(target, absent(rig, target), distance=1, budget_bytes=BUDGET)

        rig.step(layer, absent(rig, layer), guess)


def prompt(rig: Any) -> None:
    rig.store.prefill.begin(1, 500)
    for layer in range(LAYERS):
        rig.step(layer, ALL, None, [])


def smaller(rig: Any) -> None:
    rig.store.prefetch(1, absent(rig, 1), distance=1, budget_bytes=BUDGET)
    rig.tier.poll()
    shrink(rig.tier, rig.arena, 4096, rig.device)


def emptied(rig: Any) -> None:
    rig.store.prefetch(1, absent(rig, 1), distance=1, budget_bytes=BUDGET)
    rig.store.empty()


def told(rig: Any) -> None:
    decode(rig)
    rig.store.snapshot()


MOMENTS: dict[str, Callable[[Any], None]] = {
    "decode": decode,
    "waves": waves,
    "prefetch": guessing,
    "prompt": prompt,
    "shrink": smaller,
    "empty": emptied,
    "stats": told,
}


def make(make_rig: Make, any_scheduler: Make, mode: str, shared: bool) -> tuple[Any, FailingDevice]:
    device = FailingDevice(3)
    scheduler = any_scheduler(1) if shared else None
    rig = make_rig(mode, slots=4, ram_slots=5, staging=3, device=device, scheduler=scheduler, least=2)
    rig.tokens = lambda expert: 1 + expert % 3
    for layer in range(LAYERS):
        rig.step(layer, [0, 1, 2])
    rig.settle()
    return rig, device


def run(moment: Callable[[Any], None], rig: Any) -> BaseException | None:
    """What the moment raised: an error that was injected or one of ours, never a failed check."""
    try:
        moment(rig)
    except AssertionError:
        raise
    except (RuntimeError, MemoryError, MoeLocalError) as error:
        return error
    return None


@pytest.mark.parametrize("mode", ["ram", "ram+disk"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("shared", others_slow([False, True], [True]))
def test_once(make_rig: Make, any_scheduler: Make, mode: str, moment: str, shared: bool) -> None:
    """The store agrees with itself at once, and serves right bytes as if nothing had been."""
    happened = set()
    rig, device = make(make_rig, any_scheduler, mode, shared)
    for countdown in (1, 5):
        for number, call in enumerate(CALLS):
            name = list(FAULTS)[(number + countdown) % len(FAULTS)]
            device.order(call, FAULTS[name], countdown, for_good=False)
            error = run(MOMENTS[moment], rig)
            if device.happened:
                happened.add(call)
            else:
                assert error is None, (call, error)
            device.cancel()
            rig.check()
            decode(rig)
            prompt(rig)
            rig.settle()
    rig.close()
    assert happened >= ({"copy", "wait", "record"} if moment not in ("shrink", "empty") else set())
    assert happened


@pytest.mark.parametrize("mode", ["ram", "ram+disk"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_for_good(make_rig: Make, any_scheduler: Make, mode: str, moment: str) -> None:
    """A device that is gone: an error, and a close that ends, gives the memory back and leaves no thread."""
    for call in CALLS:
        rig, device = make(make_rig, any_scheduler, mode, False)
        threads = [*rig.disk._threads]
        device.order(call, FAULTS["a lost device"], 1, for_good=True)
        error = run(MOMENTS[moment], rig)
        if device.happened:
            device.call = call
            with pytest.raises((RuntimeError, MoeLocalError)):
                for layer in range(LAYERS):
                    list(rig.serve(layer, ALL))
        else:
            assert error is None
        rig.store.close()
        assert rig.arena.slots == (0,) * LAYERS
        assert not any(thread.is_alive() for thread in threads)
