"""bitsandbytes is imported once, quietly, from whichever thread comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.kernels import bnb
from moe_local.offload.quantize import bnb as importing

FIRST_USE = """
import logging, sys
from concurrent.futures import ThreadPoolExecutor
import moe_local.offload.quantize.nf4
from moe_local.offload.quantize.bnb import bitsandbytes_ops
assert "bitsandbytes" not in sys.modules
with ThreadPoolExecutor(8) as pool:
    found = {id(ops) for ops in pool.map(lambda _: bitsandbytes_ops(), range(8))}
assert len(found) == 1
assert "bitsandbytes" in sys.modules and "kernels" not in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules, "compilers that nothing needs"
assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.NOTSET
"""


def test_first_use_from_several_threads_is_safe_and_silent() -> None:
    """In a process of its own: nothing on stderr, nothing imported before use, no code from the Hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("options", [{}, {"dynamic": False}])
def test_what_it_wants_compiled_is_compiled_when_called(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    compiled: list[tuple[Any, dict[str, Any]]] = []

    def compile(function: Any, **given: Any) -> Any:
        compiled.append((function, given))
        return lambda x, *, y: 10 * function(x, y=y)

    def its_own(x: int, *, y: int) -> int:
        return x + y

    def ours(x: int, *, y: int) -> int:
        return x - y

    its_own.__module__ = "bitsandbytes.backends.default.ops"
    monkeypatch.setattr(torch, "compile", compile)
    with importing._compiling_later():
        decorator = torch.compile(**options) if options else torch.compile
        wanted, other = decorator(its_own), torch.compile(ours)
    assert torch.compile is compile
    assert compiled == [(ours, {})]
    assert other(3, y=2) == 10
    assert wanted(3, y=2) == wanted(3, y=2) == 50
    assert compiled[1:] == [(its_own, options)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_passes_its_check(dtype: torch.dtype) -> None:
    bnb.check(torch.device("cpu"), dtype)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (RuntimeError("\n  VERSION MISMATCH \nand pages"), "on cpu: VERSION MISMATCH; pip install"),
        (torch.ones(1, 64), r"on cpu: 64 times -1 is 1\.0; pip"),
        (torch.full((1, 64), torch.nan), "is nan"),
    ],
)
def test_one_that_does_not_compute_is_a_line(monkeypatch: pytest.MonkeyPatch, answer: Any, said: str) -> None:
    def multiply(*arguments: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    ops = SimpleNamespace(gemm_4bit=SimpleNamespace(default=multiply))
    monkeypatch.setattr(bnb, "bitsandbytes_ops", lambda: ops)
    with pytest.raises(MoeLocalError, match=said) as raised:
        bnb.check(torch.device("cpu"), torch.float32)
    assert "\n" not in str(raised.value)
