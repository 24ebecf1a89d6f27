"""Structures of moe_linear_attention.h that describe a call by itself: no matrices, only tensors."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p


class DeltaRule(Structure):
    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("beta", c_void_p),
        ("decay", c_void_p),
        ("state", c_void_p),
        ("y", c_void_p),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("rows", c_int64),
        ("tokens", c_int64),
        ("key_heads", c_int64),
        ("value_heads", c_int64),
        ("key_width", c_int64),
        ("value_width", c_int64),
        ("dtype", c_int32),
        ("normalized", c_int32),
    )


class Mamba2Scan(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("b", c_void_p),
        ("c", c_void_p),
        ("dt", c_void_p),
        ("dt_bias", c_void_p),
        ("a", c_void_p),
        ("d", c_void_p),
        ("state", c_void_p),
        ("y", c_void_p),
        ("x_stride", c_int64),
        ("b_stride", c_int64),
        ("dt_stride", c_int64),
        ("rows", c_int64),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("groups", c_int64),
        ("width", c_int64),
        ("states", c_int64),
        ("least", c_float),
        ("most", c_float),
        ("dtype", c_int32),
        ("softplus", c_int32),
    )


class Convolution(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("state", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("channels", c_int64),
        ("taps", c_int64),
        ("dtype", c_int32),
        ("silu", c_int32),
    )


class SequenceConvolution(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("row_stride", c_int64),
        ("channel_stride", c_int64),
        ("token_stride", c_int64),
        ("rows", c_int64),
        ("channels", c_int64),
        ("tokens", c_int64),
        ("taps", c_int64),
        ("dtype", c_int32),
        ("silu", c_int32),
    )
