"""Arguments that make no sense are refused, and nothing is touched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.native.library import FLOATS, FORMATS, ISAS, Expert, Gate, Matrix, check
from support import packed

OK, BAD_ARGUMENT, OUT_OF_MEMORY, UNSUPPORTED = range(4)


class Linear:
    """The arguments of a call of moe_linear that succeeds, to be spoilt."""

    def __init__(self, format: str) -> None:
        self.packed = packed.pack(format, 8, 64)
        self.m: Matrix = self.packed.struct
        self.x = torch.ones(2, 64)
        self.y = packed.Guarded(2, 8)
        self.tokens, self.dtype, self.activations, self.threads = 2, 0, FLOATS, 1
        self.addresses: list[Any] = [ctypes.byref(self.m), self.x.data_ptr(), self.y.values.data_ptr()]

    def __call__(self, lib: Any) -> int:
        matrix, x, y = self.addresses
        status: int = lib.moe_linear(matrix, x, self.tokens, y, self.dtype, self.activations, self.threads)
        return status


LINEAR: dict[str, Callable[[Linear], Any]] = {
    "no matrix": lambda call: call.addresses.__setitem__(0, None),
    "no x": lambda call: call.addresses.__setitem__(1, None),
    "no y": lambda call: call.addresses.__setitem__(2, None),
    "fewer than no tokens": lambda call: setattr(call, "tokens", -1),
    "no threads": lambda call: setattr(call, "threads", 0),
    "fewer than no threads": lambda call: setattr(call, "threads", -4),
    "activations below": lambda call: setattr(call, "activations", -1),
    "activations above": lambda call: setattr(call, "activations", 7),
    "format below": lambda call: setattr(call.m, "format", -1),
    "format above": lambda call: setattr(call.m, "format", max(FORMATS.values()) + 1),
    "bias of no dtype": lambda call: setattr(call.m, "bias_dtype", 3),
    "dtype below": lambda call: setattr(call, "dtype", -1),
    "dtype above": lambda call: setattr(call, "dtype", 3),
    "no rows": lambda call: setattr(call.m, "rows", 0),
    "negative rows": lambda call: setattr(call.m, "rows", -8),
    "no columns": lambda call: setattr(call.m, "cols", 0),
    "negative columns": lambda call: setattr(call.m, "cols", -64),
    "too many rows": lambda call: setattr(call.m, "rows", 2**62),
    "too many columns": lambda call: setattr(call.m, "cols", 2**63 - 1),
    "no q": lambda call: setattr(call.m, "q", None),
}


@pytest.mark.parametrize("wrong", LINEAR)
@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_product_is_refused(lib: Any, format: str, wrong: str) -> None:
    call = Linear(format)
    assert call(lib) == OK
    call.y.values.fill_(3.0)
    LINEAR[wrong](call)
    assert call(lib) == BAD_ARGUMENT
    assert (call.y.take() == 3.0).all()


@pytest.mark.parametrize("format", ["nf4", "int8", "q3", "q2", "mxfp4", "fp8", "nvfp4"])
def test_a_product_without_scales_is_refused(lib: Any, format: str) -> None:
    call = Linear(format)
    call.m.scales = None
    assert call(lib) == BAD_ARGUMENT


@pytest.mark.parametrize("format", ["q3", "q2", "nvfp4"])
def test_scales_of_rows_are_needed(lib: Any, format: str) -> None:
    call = Linear(format)
    call.m.nested = None
    assert call(lib) == BAD_ARGUMENT


@pytest.mark.parametrize("size", [0, -128])
@pytest.mark.parametrize("part", ["block_rows", "block_cols"])
def test_fp8_needs_blocks(lib: Any, part: str, size: int) -> None:
    call = Linear("fp8")
    setattr(call.m, part, size)
    assert call(lib) == BAD_ARGUMENT


def test_second_scales_need_rows(lib: Any) -> None:
    call = Linear("nvfp4")
    call.m.block_rows = 0
    assert call(lib) == BAD_ARGUMENT


@pytest.mark.parametrize("dtype", [-1, 4])
def test_fp8_scales_of_no_dtype_are_refused(lib: Any, dtype: int) -> None:
    call = Linear("fp8")
    call.m.scale_dtype = dtype
    assert call(lib) == BAD_ARGUMENT


@pytest.mark.parametrize("part", ["nested", "offset"])
def test_nf4_needs_all_its_scales(lib: Any, part: str) -> None:
    call = Linear("nf4")
    setattr(call.m, part, None)
    assert call(lib) == BAD_ARGUMENT


def test_memory_that_is_not_to_be_had_is_an_error(lib: Any) -> None:
    call = Linear("int8")
    call.m.rows, call.m.cols, call.tokens = 1, 2**40, 256
    assert call(lib) == OUT_OF_MEMORY
    assert Linear("int8")(lib) == OK


class Experts:
    """The arguments of a call of moe_experts that succeeds: two experts, three tokens, two of them each."""

    def __init__(self) -> None:
        self.gate = Gate(1, 3, 0.0, 0.0)
        self.pairs = [packed.pack_expert("nf4", 64, 32, self.gate, seed=e) for e in range(2)]
        self.experts = [Expert.from_buffer_copy(pair.struct) for pair in self.pairs]
        self.pointers = (ctypes.c_void_p * 2)(*map(ctypes.addressof, self.experts))
        self.starts = (ctypes.c_int64 * 3)(0, 3, 6)
        self.tokens = (ctypes.c_int64 * 6)(0, 1, 2, 0, 1, 2)
        self.places = (ctypes.c_int64 * 6)(0, 2, 4, 1, 3, 5)
        self.x, self.weights = torch.ones(3, 64), torch.ones(3, 2)
        self.outputs, self.combined = packed.Guarded(6, 64), packed.Guarded(3, 64)
        self.arguments: dict[str, Any] = {
            "experts": self.pointers,
            "count": 2,
            "starts": self.starts,
            "tokens": self.tokens,
            "places": self.places,
            "gate": ctypes.byref(self.gate),
            "x": self.x.data_ptr(),
            "tokens_in_x": 3,
            "outputs": self.outputs.values.data_ptr(),
            "weights": self.weights.data_ptr(),
            "top_k": 2,
            "combined": self.combined.values.data_ptr(),
            "dtype": 0,
            "activations": FLOATS,
            "threads": 1,
        }

    def __call__(self, lib: Any) -> int:
        status: int = lib.moe_experts(*self.arguments.values())
        return status


def put(name: str, value: Any) -> Callable[[Experts], Any]:
    return lambda call: call.arguments.__setitem__(name, value)


def change(of: Callable[[Experts], Any], field: str, value: Any) -> Callable[[Experts], Any]:
    return lambda call: setattr(of(call), field, value)


def item(name: str, index: int, value: Any) -> Callable[[Experts], Any]:
    return lambda call: getattr(call, name).__setitem__(index, value)


EXPERTS: dict[str, Callable[[Experts], Any]] = {
    **{
        f"no {name}": put(name, None)
        for name in ("experts", "starts", "tokens", "places", "gate", "x", "outputs", "combined")
    },
    "negative count": put("count", -1),
    "negative tokens": put("tokens_in_x", -1),
    "no threads": put("threads", 0),
    "unknown activations": put("activations", 77),
    "top-k of none": put("top_k", 0),
    "a top-k beyond all numbers": put("top_k", 2**62),
    "an expert that is null": item("pointers", 1, None),
    "starts that start late": item("starts", 0, 1),
    "starts that fall": item("starts", 1, 7),
    "a token that is not there": item("tokens", 4, 3),
    "a negative token": item("tokens", 4, -1),
    "a place that is not there": item("places", 5, 6),
    "a negative place": item("places", 5, -1),
    "an unknown arrangement": change(lambda call: call.gate, "arrangement", 3),
    "an unknown function": change(lambda call: call.gate, "function", 8),
    "a negative function": change(lambda call: call.gate, "function", -1),
    "a clamped gate without a gate": lambda call: (
        setattr(call.gate, "arrangement", 0),
        setattr(call.gate, "function", 6),
    ),
    "no gate where the shapes have one": change(lambda call: call.gate, "arrangement", 0),
    "an odd number of rows": change(lambda call: call.experts[1].up, "rows", 63),
    "an expert of another width": change(lambda call: call.experts[1].up, "cols", 32),
    "an expert of another format": change(lambda call: call.experts[1].down, "format", 1),
    "a down projection of another depth": change(lambda call: call.experts[0].down, "cols", 16),
    "an expert without bytes": change(lambda call: call.experts[1].down, "q", None),
}


@pytest.mark.parametrize("wrong", EXPERTS)
def test_wrong_experts_are_refused(lib: Any, wrong: str) -> None:
    call = Experts()
    assert call(lib) == OK
    for out in (call.outputs, call.combined):
        out.values.fill_(3.0)
    EXPERTS[wrong](call)
    assert call(lib) == BAD_ARGUMENT
    assert (call.outputs.take() == 3.0).all()
    assert (call.combined.take() == 3.0).all()


def test_no_experts_or_tokens_are_no_work(lib: Any) -> None:
    for name in ("count", "tokens_in_x"):
        call = Experts()
        call.arguments[name] = 0
        assert call(lib) == OK
        assert call.outputs.take().isnan().all()


def test_the_rest_refuses_too(lib: Any) -> None:
    gate = ctypes.byref(Gate(1, 3, 0.0, 0.0))
    memory = torch.ones(64)
    at = memory.data_ptr()
    for isa in (-1, len(ISAS), 2**31 - 1, -(2**31)):
        assert lib.moe_set_isa(isa) == UNSUPPORTED
    assert lib.moe_set_map(None) == BAD_ARGUMENT
    for call in (
        lambda: lib.moe_gate(None, at, 1, 8, at),
        lambda: lib.moe_gate(gate, None, 1, 8, at),
        lambda: lib.moe_gate(gate, at, 1, 8, None),
        lambda: lib.moe_gate(gate, at, -1, 8, at),
        lambda: lib.moe_gate(gate, at, 1, -8, at),
        lambda: lib.moe_gate(ctypes.byref(Gate(9, 3, 0.0, 0.0)), at, 1, 8, at),
        lambda: lib.moe_combine(None, at, 1, 1, 8, at),
        lambda: lib.moe_combine(at, None, 1, 1, 8, at),
        lambda: lib.moe_combine(at, at, 1, 1, 8, None),
        lambda: lib.moe_combine(at, at, 1, 0, 8, at),
        lambda: lib.moe_combine(at, at, -1, 1, 8, at),
        lambda: lib.moe_combine(at, at, 1, 1, -8, at),
        lambda: lib.moe_nf4_encode(None, 0, 64, at, at, 1),
        lambda: lib.moe_nf4_encode(at, 0, 64, None, at, 1),
        lambda: lib.moe_nf4_encode(at, 0, 64, at, None, 1),
        lambda: lib.moe_nf4_encode(at, 3, 64, at, at, 1),
        lambda: lib.moe_nf4_encode(at, -1, 64, at, at, 1),
        lambda: lib.moe_nf4_encode(at, 0, -64, at, at, 1),
        lambda: lib.moe_nf4_encode(at, 0, 64, at, at, 0),
    ):
        assert call() == BAD_ARGUMENT
    for call in (
        lambda: lib.moe_gate(gate, None, 0, 8, None),
        lambda: lib.moe_gate(gate, None, 3, 0, None),
        lambda: lib.moe_combine(None, None, 0, 1, 8, None),
        lambda: lib.moe_nf4_encode(None, 0, 0, None, None, 1),
    ):
        assert call() == OK
    assert (memory == 1).all()


@pytest.mark.parametrize(
    ("status", "words"), [(1, "bad argument"), (2, "out of memory"), (3, "processor"), (99, "99")]
)
def test_a_status_becomes_an_error_of_one_line(status: int, words: str) -> None:
    check(OK)
    with pytest.raises(MoeLocalError, match=words) as caught:
        check(status)
    assert "\n" not in str(caught.value)
