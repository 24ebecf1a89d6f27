"""Where the C++ library is not there or cannot be used: said once, and everything computed without it."""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_local.offload.kernels.gates import recognize
from moe_local.offload.kernels.layer import LayerKernels, OneByOne
from moe_local.offload.kernels.routing import Routing
from moe_local.offload.native import library as module
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import Layout, TensorSpec
from support import packed
from support.expert_math import Math


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the library is looked for, afresh; empty."""
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    module.library.cache_clear()
    yield tmp_path
    module.library.cache_clear()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "moe_local"]


class Slot:
    """An expert that may be read."""

    def __init__(self, expert: int) -> None:
        self.expert = expert
        specs = (TensorSpec("gate_up_proj", (64, 96)), TensorSpec("down_proj", (96, 32)))
        generator = torch.Generator().manual_seed(expert)
        weights = {spec.name: torch.randn(spec.shape, generator=generator) / 8 for spec in specs}
        codec = codec_for("nf4")
        self.layout: Layout = codec.layout(specs)
        self.buffer = torch.empty(self.layout.nbytes, dtype=torch.uint8)
        codec.encode(weights, self.layout, self.buffer)
        self.weights = codec.decode(self.buffer, self.layout, torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = Math().activate(x.double() @ self.weights["gate_up_proj"].double().T)
        return hidden @ self.weights["down_proj"].double().T


def computes_without_it() -> None:
    """A layer of two experts, by the slow path, and right."""
    slots = [Slot(0), Slot(1)]
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    weights = torch.full((3, 2), 0.5)
    step = LayerKernels().begin(Math(), x, Routing([0, 1, 1, 0, 0, 1], 3, 2), weights, slots[0].layout)
    assert isinstance(step, OneByOne)
    step.compute(slots)
    want = (slots[0].forward(x) + slots[1].forward(x)) / 2
    assert float((step.result() - want).norm() / want.norm()) < 1e-6
    assert recognize(Math()) is None


def test_without_the_library_it_is_said_once_and_computed_all_the_same(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert module.library() is None
        computes_without_it()
    (said,) = warnings(caplog)
    assert "compiler" in said
    assert "\n" not in said


def cut_short(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[:40])


def no_library(path: Path, whole: bytes) -> None:
    path.write_text("not a library\n")


def empty(path: Path, whole: bytes) -> None:
    path.touch()


@pytest.mark.parametrize("damage", [cut_short, no_library, empty])
def test_a_damaged_library_is_named_once_and_done_without(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path, bytes], None]
) -> None:
    path = folder / "_native.so"
    compiled = Path(module.__file__).parent / "_native.so"
    damage(path, compiled.read_bytes() if compiled.exists() else b"\x7fELF" * 100)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert module.library() is None
        computes_without_it()
    (said,) = warnings(caplog)
    assert str(path) in said
    assert "install moe-local again" in said
    assert "\n" not in said


def test_a_library_of_another_version_is_done_without(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = Path(module.__file__).parent / "_native.so"
    if not compiled.exists():
        pytest.skip("the C++ library was not compiled")
    shutil.copy(compiled, folder)
    monkeypatch.setitem(module._ARGUMENTS, "moe_of_tomorrow", [])
    with caplog.at_level(logging.WARNING):
        assert module.library() is None
    assert "moe_of_tomorrow" in warnings(caplog)[0]


def test_a_whole_library_is_found_wherever_it_lies(folder: Path, caplog: Any) -> None:
    compiled = Path(module.__file__).parent / "_native.so"
    if not compiled.exists():
        pytest.skip("the C++ library was not compiled")
    shutil.copy(compiled, folder)
    assert module.library() is module.library() is not None
    assert not warnings(caplog)


def test_nf4_is_refused_until_the_scales_map_is_known(folder: Path) -> None:
    compiled = Path(module.__file__).parent / "_native.so"
    if not compiled.exists():
        pytest.skip("the C++ library was not compiled")
    shutil.copy(compiled, folder / "_native.other.so")  # another copy, whose map nobody has set
    lib = ctypes.CDLL(str(folder / "_native.other.so"))
    lib.moe_linear.argtypes = module._ARGUMENTS["moe_linear"]
    x, y = torch.ones(1, 64), torch.empty(1, 4)
    for format, status in (("int8", 0), ("nf4", 1)):
        m = packed.pack(format, 4, 64)
        assert lib.moe_linear(ctypes.byref(m.struct), x.data_ptr(), 1, y.data_ptr(), 0, 0, 1) == status
