"""The pool: more threads than cores, several callers, forks and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from moe_local.offload.native.library import FLOATS, INT8, Gate
from support import packed


@pytest.fixture
def wide(lib: Any) -> tuple[Callable[[int], torch.Tensor], torch.Tensor]:
    """compute(threads) -> y of a product long enough that threads are woken for it; and what it must be."""
    m = packed.pack("nf4", 3000, 512)
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))

    def compute(threads: int) -> torch.Tensor:
        return packed.linear(m, x, INT8, threads)  # type: ignore[no-any-return]

    return compute, compute(1)


def test_many_more_threads_than_cores(wide: Any) -> None:
    compute, want = wide
    for threads in (2, 64, 256, 100_000, 3):
        for _ in range(5):
            assert torch.equal(compute(threads), want)


def test_callers_do_not_disturb_one_another(lib: Any) -> None:
    """While one has the pool the others compute alone; each has memory of its own."""
    gate = Gate(1, 3, 0, 0)
    experts = [packed.pack_expert("nf4", 256, 256, gate, seed=e) for e in range(4)]

    def compute(tokens: int) -> torch.Tensor:
        ids, weights = packed.routing(tokens, 4, 2, seed=tokens)
        x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(tokens))
        return packed.run_experts(  # type: ignore[no-any-return]
            experts, ids, weights, x, gate, FLOATS, threads=3
        ).combined

    sizes = [1 + n % 7 for n in range(160)]
    want = {tokens: compute(tokens) for tokens in set(sizes)}
    with ThreadPoolExecutor(6) as callers:
        for tokens, got in zip(sizes, callers.map(compute, sizes), strict=True):
            assert torch.equal(got, want[tokens])


@pytest.fixture
def children() -> Callable[[Callable[[], bool]], int]:
    """run(work) -> exit status of a forked child: 0 if work() is true. It is killed if it hangs."""

    def run(work: Callable[[], bool]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = 0 if work() else 3
            finally:
                os._exit(status)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return -signal.SIGKILL

    return run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_and_so_does_its_child(wide: Any, children: Any) -> None:
    compute, want = wide
    assert torch.equal(compute(3), want)  # the pool has threads, which a child does not inherit

    def in_child() -> bool:
        return torch.equal(compute(3), want) and children(lambda: torch.equal(compute(2), want)) == 0

    assert children(in_child) == 0
    assert torch.equal(compute(3), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_amid_another_threads_call(wide: Any, children: Any) -> None:
    compute, want = wide
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            compute(3)

    other = threading.Thread(target=keep_busy)
    other.start()
    try:
        for _ in range(10):
            assert children(lambda: torch.equal(compute(3), want)) == 0
    finally:
        stop.set()
        other.join()
    assert torch.equal(compute(3), want)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers")
def test_signals_are_handled_and_change_nothing(wide: Any) -> None:
    compute, want = wide
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(threading.current_thread()))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        deadline = time.monotonic() + 200
        while len(seen) < 50 and time.monotonic() < deadline:
            assert torch.equal(compute(4), want)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) >= 50
    assert set(seen) == {threading.main_thread()}


CHILD = """
import ctypes, os, time, torch
from moe_local.offload.native.library import Matrix, library
q = torch.zeros(4096 * 512, dtype=torch.int8)
scales = torch.ones(4096 * 8, dtype=torch.float16)
m = Matrix(1, 0, 4096, 512, q.data_ptr(), scales.data_ptr())
x, y = torch.ones(1, 512), torch.empty(1, 4096)
lib = library()
def run():
    assert lib.moe_linear(ctypes.byref(m), x.data_ptr(), 1, y.data_ptr(), 0, 0, 4) == 0
for _ in range(3):
    run()
before = os.times()
time.sleep(0.5)
after = os.times()
print(after.user + after.system - before.user - before.system)
"""


@pytest.mark.slow
def test_threads_sleep_between_calls_and_let_the_process_end(lib: Any) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120, check=True
    )
    assert float(ended.stdout) < 0.25  # one thread that spins takes 0.5 s of a processor, three take more
