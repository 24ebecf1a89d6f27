"""One thread for torch here and now, and nowhere else or afterwards."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch

from moe_local.offload.quantize.parallel import for_each
from moe_local.offload.system import threads
from moe_local.offload.system.threads import kernel_threads, one_torch_thread

USUAL = 3


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(USUAL)
    yield
    torch.set_num_threads(before)


def elsewhere(call: Callable[[], Any]) -> Any:
    """What `call` returns in a thread of its own, which torch has not seen before."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def numbers() -> tuple[int, int]:
    """Threads for our kernels, and for torch's operations."""
    return kernel_threads(), torch.get_num_threads()


def numbers_within() -> tuple[int, int]:
    with one_torch_thread():
        return numbers()


def test_threads_that_begin_meanwhile_have_the_usual_number() -> None:
    def begin_and_use() -> list[tuple[int, int]]:
        began = numbers()
        inside.set()
        left.wait(60)
        return [began, numbers_within(), numbers()]

    inside, left, results = threading.Event(), threading.Event(), []
    with one_torch_thread():
        other = threading.Thread(target=lambda: results.extend(begin_and_use()))
        other.start()
        assert inside.wait(60)
    left.set()
    other.join()
    assert results == [(USUAL, USUAL), (USUAL, 1), (USUAL, USUAL)]
    assert elsewhere(numbers) == numbers() == (USUAL, USUAL)


def test_within_all_of_torch_has_one_thread() -> None:
    """MKL has a number of its own, once somebody has set torch's."""
    with one_torch_thread():
        with one_torch_thread():
            assert numbers() == (USUAL, 1)
        assert numbers() == (USUAL, 1)
        figures = re.findall(r"(?:omp|mkl)_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
        assert set(figures) == {"1"}
    figures = re.findall(r"(?:omp|mkl)_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    assert set(figures) == {str(USUAL)}


def test_a_number_that_the_user_sets_later_counts() -> None:
    assert numbers_within() == (USUAL, 1)
    for number in (2, 1, 4):
        torch.set_num_threads(number)
        assert numbers_within() == elsewhere(numbers_within) == (number, 1)
        assert elsewhere(numbers) == numbers() == (number, number)


def test_parts_are_worked_on_by_threads_of_one_each() -> None:
    seen: list[int] = []
    for_each([slice(i, i + 1) for i in range(4)], lambda part: seen.append(torch.get_num_threads()))
    assert seen == [1] * 4
    assert elsewhere(numbers) == numbers() == (USUAL, USUAL)


@pytest.mark.parametrize("other", [OSError, None])
def test_without_torchs_openmp_torch_keeps_its_threads(
    monkeypatch: pytest.MonkeyPatch, other: type[Exception] | None
) -> None:
    """It is not found, or is another one than torch uses."""

    def refuse(path: str) -> NoReturn:
        raise OSError("no such library")

    class Another:
        def omp_set_num_threads(self, number: int) -> None: ...

    monkeypatch.setattr(ctypes, "PyDLL", (lambda path: Another()) if other is None else refuse)
    threads._setters.cache_clear()
    try:
        assert numbers_within() == numbers() == (USUAL, USUAL)
    finally:
        threads._setters.cache_clear()
