"""The C++ library through ctypes: its structures and functions, as moe_native.h declares them."""

from __future__ import annotations

import ctypes
import logging
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.native.linear_attention import Convolution, DeltaRule, Mamba2Scan, SequenceConvolution
from moe_local.offload.quantize.code_tables import dynamic_map

FORMATS = {
    name: number
    for number, name in enumerate(
        ("nf4", "int8", "q3", "q2", "mxfp4", "fp8", "nvfp4", "fp32", "bf16", "fp16")
    )
}
PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The formats of unquantized weights, by their dtypes."""

FLOATS, INT16, INT8, BF16 = range(4)
"""How activations enter a product: as floats, rounded to 16 or 8 bits in blocks of 64, or as floats that were
bf16 (see Activations in moe_native.h)."""

ISAS = ("portable", "avx2", "avx512_vnni", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of inputs and outputs."""

SCALES = {"float32": 0, "bfloat16": 1, "float16": 2, "uint8": 3}
"""Dtypes of FP8's scales; uint8 stands for exponents (E8M0)."""

HALVES, NEIGHBOURS, APART = range(3)
"""How rotary embeddings pair a head's numbers: i with i + rotated / 2, or 2i with 2i + 1. APART: the latter,
with results at i and i + rotated / 2."""

SOFTMAX, SIGMOID = range(2)
"""What a router makes of logits."""

_FOLDER = Path(__file__).parent
BAD_ARGUMENT, SCATTERED = 1, 4
_ERRORS = {BAD_ARGUMENT: "bad argument", 2: "out of memory", 3: "not for this processor"}


class Gate(Structure):
    _fields_ = (("arrangement", c_int32), ("function", c_int32), ("alpha", c_float), ("limit", c_float))


class Matrix(Structure):
    _fields_ = (
        ("format", c_int32),
        ("bias_dtype", c_int32),
        ("rows", c_int64),
        ("cols", c_int64),
        ("q", c_void_p),
        ("scales", c_void_p),
        ("nested", c_void_p),
        ("offset", c_void_p),
        ("bias", c_void_p),
        ("block_rows", c_int64),
        ("block_cols", c_int64),
        ("scale_dtype", c_int32),
        ("divides", c_int32),
    )


class Expert(Structure):
    _fields_ = (("up", Matrix), ("down", Matrix))


class Attention(Structure):
    _fields_ = (
        ("q", Matrix),
        ("k", Matrix),
        ("v", Matrix),
        ("o", Matrix),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("width", c_int64),
        ("rotated", c_int64),
        ("rotation", c_int32),
        ("shared", c_int32),
        ("scaling", c_float),
        ("epsilon", c_float),
        ("dtype", c_int32),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("sinks", c_void_p),
        ("gated", c_int32),
        ("shifted", c_int32),
    )


class LatentAttention(Structure):
    _fields_ = (
        ("q_a", Matrix),
        ("q_b", Matrix),
        ("kv_a", Matrix),
        ("kv_b", Matrix),
        ("o", Matrix),
        ("heads", c_int64),
        ("latent", c_int64),
        ("plain", c_int64),
        ("rotated", c_int64),
        ("value", c_int64),
        ("rotation", c_int32),
        ("shared", c_int32),
        ("scaling", c_float),
        ("dtype", c_int32),
        ("q_norm", c_void_p),
        ("kv_norm", c_void_p),
        ("q_epsilon", c_float),
        ("kv_epsilon", c_float),
    )


class Norm(Structure):
    _fields_ = (("weight", c_void_p), ("epsilon", c_float), ("shifted", c_int32))


class Router(Structure):
    _fields_ = (
        ("matrix", POINTER(Matrix)),
        ("top_k", c_int64),
        ("normalized", c_int32),
        ("scaling", c_float),
        ("dtype", c_int32),
        ("logits_dtype", c_int32),
        ("scoring", c_int32),
        ("correction_dtype", c_int32),
        ("correction", c_void_p),
        ("groups", c_int64),
        ("top_groups", c_int64),
        ("best", c_int64),
    )


class Mlp(Structure):
    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("function", c_int32),
        ("dtype", c_int32),
    )


class DeltaNet(Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("z", Matrix),
        ("b", Matrix),
        ("a", Matrix),
        ("o", Matrix),
        ("key_heads", c_int64),
        ("value_heads", c_int64),
        ("key_width", c_int64),
        ("value_width", c_int64),
        ("taps", c_int64),
        ("convolution", c_void_p),
        ("convolution_bias", c_void_p),
        ("a_log", c_void_p),
        ("dt_bias", c_void_p),
        ("norm", c_void_p),
        ("epsilon", c_float),
        ("dtype", c_int32),
        ("by_key_head", c_int32),
    )


class Layer(Structure):
    _fields_ = (
        ("attention", POINTER(Attention)),
        ("latent_attention", POINTER(LatentAttention)),
        ("delta_net", POINTER(DeltaNet)),
        ("before_attention", Norm),
        ("before_feed_forward", Norm),
    )


class WholeLayer(Structure):
    _fields_ = (
        ("layer", POINTER(Layer)),
        ("router", POINTER(Router)),
        ("experts", c_void_p),
        ("count", c_int64),
        ("gate", POINTER(Gate)),
        ("chosen", c_void_p),
        ("activations", c_int32),
        ("of_experts", c_int32),
        ("of_shared", c_int32),
        ("shared", POINTER(Mlp)),
        ("share", POINTER(Matrix)),
    )


class Sequence(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("head_stride", c_int64),
        ("first", c_int64),
        ("last", c_int64),
    )


class Strided(Structure):
    _fields_ = (("numbers", c_void_p), ("row", c_int64), ("head", c_int64), ("token", c_int64))


class PromptAttention(Structure):
    _fields_ = (
        ("q", Strided),
        ("k", Strided),
        ("v", Strided),
        ("seen", c_void_p),
        ("sinks", c_void_p),
        ("y", c_void_p),
        ("sequences", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("width", c_int64),
        ("value_width", c_int64),
        ("scaling", c_float),
        ("dtype", c_int32),
    )


class Mamba2(Structure):
    _fields_ = (
        ("in", Matrix),
        ("out", Matrix),
        ("heads", c_int64),
        ("groups", c_int64),
        ("width", c_int64),
        ("states", c_int64),
        ("taps", c_int64),
        ("convolution", c_void_p),
        ("convolution_bias", c_void_p),
        ("a_log", c_void_p),
        ("d", c_void_p),
        ("dt_bias", c_void_p),
        ("norm", c_void_p),
        ("epsilon", c_float),
        ("dtype", c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None if it was not compiled or cannot be loaded, which is logged once."""
    found = sorted(_FOLDER.glob("_native.*"))
    path = next((file for file in found if file.suffix in (".so", ".dll")), None)
    if path is None:
        _do_without(
            "the C++ kernels are not there", "install a C++17 compiler (g++ or clang++) and moe-local again"
        )
        return None
    try:
        lib = ctypes.CDLL(str(path))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = arguments, c_int32
        check(lib.moe_set_map(dynamic_map(torch.device("cpu")).data_ptr()))
    except (OSError, AttributeError) as error:  # damaged, of another machine, or of another version
        _do_without(f"the C++ kernels cannot be loaded ({str(error).strip()})", "install moe-local again")
        return None
    return lib


@cache
def loaded_library() -> ctypes.CDLL:
    """`library()` for code that runs only where there is one."""
    lib = library()
    assert lib is not None
    return lib


def _do_without(why: str, remedy: str) -> None:
    logging.getLogger("moe_local").warning(
        "%s, so experts on the CPU run tens of times slower; %s", why, remedy
    )


def check(status: int) -> None:
    """Raises MoeLocalError unless `status`, which a function of the library returned, is zero."""
    if status:
        raise MoeLocalError(f"the C++ kernel failed: {_ERRORS.get(status, status)}")


_ARGUMENTS: dict[str, list[type]] = {
    "moe_best_isa": [],
    "moe_set_isa": [c_int32],
    "moe_isa": [],
    "moe_set_map": [c_void_p],
    "moe_linear": [POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int32, c_int32, c_int32],
    "moe_norm": [c_void_p, c_void_p, c_int32, c_float, c_int64, c_int64, c_int32, c_void_p, c_int32],
    "moe_gated_norm": [
        *(c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int64, c_int32, c_void_p, c_int32),
    ],
    "moe_open_and_norm": [
        *(
            c_void_p,
            c_void_p,
            c_void_p,
            c_float,
            c_int64,
            c_int64,
            c_int64,
            c_int32,
            c_int32,
            c_void_p,
            c_int32,
        ),
    ],
    "moe_attention": [
        *(POINTER(Attention), c_void_p, c_void_p, c_void_p, POINTER(Sequence), c_int64, c_void_p, c_int32),
        c_int32,
    ],
    "moe_latent_attention": [
        *(POINTER(LatentAttention), c_void_p, c_void_p, c_void_p, POINTER(Sequence), c_int64, c_void_p),
        *(c_int32, c_int32),
    ],
    "moe_mlp": [POINTER(Mlp), POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int32, c_int32],
    "moe_layer": [
        *(POINTER(Layer), POINTER(Router), c_void_p, c_void_p, c_void_p, POINTER(Sequence), c_int64),
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int32),
    ],
    "moe_experts": [
        *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p, POINTER(Gate), c_void_p, c_int64, c_void_p),
        *(c_void_p, c_int64, c_void_p, c_int32, c_int32, c_int32),
    ],
    "moe_chosen_experts": [
        *(c_void_p, c_int64, c_void_p, c_void_p, c_int64, POINTER(Gate), c_void_p, c_int64, c_void_p),
        *(c_void_p, c_int32, c_int32, c_int32),
    ],
    "moe_layers": [
        *(POINTER(WholeLayer), c_int64, c_void_p, c_void_p, c_void_p, POINTER(Sequence), c_int64),
        *(c_void_p, c_void_p, c_void_p, c_int32),
    ],
    "moe_prompt_attention": [POINTER(PromptAttention), c_int32],
    "moe_seen": [c_void_p, c_int64, c_int64, c_void_p],
    "moe_delta_rule": [POINTER(DeltaRule), c_int32],
    "moe_mamba2_scan": [POINTER(Mamba2Scan), c_int32],
    "moe_convolve": [POINTER(Convolution), c_int32],
    "moe_convolve_sequences": [POINTER(SequenceConvolution), c_int32],
    "moe_delta_net": [
        *(POINTER(DeltaNet), c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_int32),
    ],
    "moe_change_states": [POINTER(DeltaNet), c_void_p, c_int64, c_void_p, c_void_p, c_int32],
    "moe_mamba2": [
        *(POINTER(Mamba2), c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int32, c_int32),
    ],
    "moe_route": [
        *(POINTER(Router), c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_int32),
    ],
    "moe_combine": [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    "moe_gate": [POINTER(Gate), c_void_p, c_int64, c_int64, c_void_p],
    "moe_nf4_encode": [c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int32],
    "moe_scales_encode": [c_void_p, c_int64, c_float, c_void_p, c_void_p, c_void_p, c_int32],
    "moe_low_encode": [
        *(c_void_p, c_int32, c_int64, c_int64, c_int32, c_void_p, c_void_p, c_void_p, c_int32),
    ],
    "moe_read": [c_void_p, c_int64, c_void_p, c_int32],
}
