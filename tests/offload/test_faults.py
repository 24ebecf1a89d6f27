"""A loaded model under faults of every kind: the right answer or an error, and the same model after it."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import moe_local
from moe_local.cache.errors import MoeLocalError, TransferError
from moe_local.offload.store.store import ExpertStore

torch.set_num_threads(1)

PROMPT = [5, 6, 7, 9, 4, 11, 3]
OPTIONS: dict[str, Any] = {"experts": "fp32", "dense": "fp32", "context": 128}


def io_error(number: int) -> Callable[[], Exception]:
    return lambda: OSError(number, os.strerror(number))


READ_FAULTS: dict[str, Callable[[], Exception]] = {
    "a bad sector": io_error(errno.EIO),
    "a disk gone": io_error(errno.ENXIO),
    "a stale file": io_error(errno.ESTALE),
    "no memory to read": MemoryError,
    "a bug in a reader": lambda: ValueError("a bug"),
}
STEP_FAULTS: dict[str, Callable[[], Exception]] = {
    "an allocation refused": lambda: torch.OutOfMemoryError("tried to allocate 1.00 GiB"),
    "no memory left": MemoryError,
    "a kernel that fails": lambda: RuntimeError("a kernel failed"),
    "a bug": lambda: ZeroDivisionError("a bug"),
}


class Injector:
    """Faults on order: the n-th read, lease or layer from now on fails, or reads end early."""

    def __init__(self, patch: pytest.MonkeyPatch, hf: Any) -> None:
        self.place, self.countdown, self.happened = "", 0, False
        self.fault: Callable[[], Exception] = ValueError
        read, lease = os.preadv, ExpertStore._lease

        def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
            if self._now("read"):
                raise self.fault()
            if self._now("cut"):
                return 0
            return read(file, buffers, offset)

        def leased(store: ExpertStore, *arguments: Any) -> Any:
            if self._now("lease"):
                raise self.fault()
            return lease(store, *arguments)

        def layer(*_: Any) -> None:
            if self._now("layer"):
                raise self.fault()

        patch.setattr(os, "preadv", preadv)
        patch.setattr(ExpertStore, "_lease", leased)
        for decoder_layer in hf.model.layers:
            decoder_layer.register_forward_pre_hook(layer)
        self._lock = threading.Lock()

    def order(self, place: str, fault: Callable[[], Exception], countdown: int) -> None:
        self.place, self.fault, self.countdown, self.happened = place, fault, countdown, False

    def cancel(self) -> None:
        self.place = ""

    def _now(self, place: str) -> bool:
        if place != self.place:
            return False
        with self._lock:
            self.countdown -= 1
            # A file that is cut, or a disk that is gone, stays so.
            now = self.countdown == 0 or (self.countdown < 0 and place in ("read", "cut"))
            self.happened |= now
            return now


@pytest.fixture(params=["off", "router"])
def model(
    request: pytest.FixtureRequest, tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[moe_local.Model]:
    """With few slots, so that most experts are read again and again."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path / "home"))
    with moe_local.load(tiny_mixtral, slots=2, prefetch=request.param, **OPTIONS) as loaded:
        yield loaded


def ids(model: moe_local.Model) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=8, eos_token_id=None).token_ids


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("moe-local-read")]


def inject(model: moe_local.Model, patch: pytest.MonkeyPatch, rounds: int, seed: int) -> None:
    calm = ids(model)
    injector = Injector(patch, model.hf)
    choose = random.Random(seed)
    process, happened = psutil.Process(), set()
    threads, files = readers(), process.num_fds()
    for number in range(rounds):
        place = choose.choice(["read", "read", "cut", "lease", "layer"])
        faults = READ_FAULTS if place in ("read", "cut") else STEP_FAULTS
        name = choose.choice(sorted(faults))
        injector.order(place, faults[name], choose.randint(1, 30))
        error: BaseException | None = None
        try:
            assert ids(model) == calm, (place, name)
        except AssertionError:
            raise
        except Exception as raised:
            error = raised
        model.check_integrity()
        if error is not None:
            assert injector.happened
            happened.add((place, name))
            check(place, error)
        elif place in ("lease", "layer"):
            assert not injector.happened, f"{name} was swallowed"
        injector.cancel()
        if number % 4 == 0:
            assert ids(model) == calm, "the model is not what it was"
    assert ids(model) == calm
    assert len(happened) >= min(8, rounds // 6)
    assert readers() == threads
    assert process.num_fds() <= files  # what earlier tests have left behind may go meanwhile


def check(place: str, error: BaseException) -> None:
    """Faults of disks are told in one line that names the expert; others come as they are or in our words."""
    if place in ("read", "cut"):
        assert isinstance(error, TransferError)
        assert str(error).startswith("expert ")
        assert "layer-0000" in str(error)
        assert "\n" not in str(error)
    else:
        ours = tuple({type(make()) for make in STEP_FAULTS.values()} | {MoeLocalError})
        assert isinstance(error, ours)


def test_faults(model: moe_local.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(model, monkeypatch, 24, seed=1)


@pytest.mark.slow
def test_many_faults(model: moe_local.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(model, monkeypatch, 800, seed=2)
