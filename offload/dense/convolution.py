"""The causal convolution in front of a layer's state, in calls of the C++ library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from moe_local.offload.native.library import (
    DTYPES,
    check,
    loaded_library,
)
from moe_local.offload.native.linear_attention import (
    Convolution,
    SequenceConvolution,
)
from moe_local.offload.system.threads import kernel_threads

CONVOLUTION, PROMPT_CONVOLUTION = "causal_conv1d_update", "causal_conv1d_fn"
"""The names by which transformers' forwards call the functions: for a single token, and for several."""

STARTS = ("seq_idx", "cu_seq_lens_q", "cu_seqlens")
"""Options that say where sequences begin which are packed into one row."""

Function = Callable[..., Any]


def convolve(
    other: Function,
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The same as transformers' causal_conv1d_update, `other`, which is called for unsupported arguments.

    hidden_states [B, C, 1], weight [C, K], bias [C] or None; conv_state [B, C, K], the last K inputs, is
    shifted by one. Returns [B, C, 1].
    """
    rows, channels, tokens = hidden_states.shape
    tensors = [hidden_states, conv_state, weight, *([] if bias is None else [bias])]
    if (
        tokens != 1
        or not hidden_states.is_cpu
        or activation not in (None, "silu", "swish")
        or len({x.dtype for x in tensors}) > 1
        or weight.dtype not in DTYPES
        or conv_state.shape != (rows, *weight.shape)
        or not conv_state.is_contiguous()
    ):
        output: torch.Tensor = other(hidden_states, conv_state, weight, bias, activation)
        return output
    x, weight = hidden_states.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    convolution = Convolution(
        *(x.data_ptr(), conv_state.data_ptr(), weight.data_ptr()),
        *(None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(rows, channels, weight.shape[1], DTYPES[x.dtype], activation is not None),
    )
    check(loaded_library().moe_convolve(ctypes.byref(convolution), kernel_threads()))
    return y


def convolve_sequences(
    other: Function,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **options: Any,
) -> torch.Tensor:
    """The same as transformers' causal_conv1d_fn, `other`, which is called for unsupported arguments.

    hidden_states [B, C, T], weight [C, K], bias [C] or None. Returns [B, C, T], in which each token's
    channels lie together.
    """
    rows, channels, tokens = hidden_states.shape
    tensors = [hidden_states, weight, *([] if bias is None else [bias])]
    if (
        not hidden_states.is_cpu
        or activation not in (None, "silu", "swish")
        or any(options.get(name) is not None for name in STARTS)
        or len({x.dtype for x in tensors}) > 1
        or weight.dtype not in DTYPES
        or len(weight) != channels
        or (bias is not None and bias.shape != (channels,))
        or not rows * tokens
    ):
        output: torch.Tensor = other(hidden_states, weight, bias, activation=activation, **options)
        return output
    x, weight = hidden_states, weight.contiguous()
    if 1 not in x.stride()[1:]:
        x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(rows, tokens, channels, dtype=x.dtype)
    convolution = SequenceConvolution(
        *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(*x.stride(), rows, channels, tokens, weight.shape[1]),
        *(DTYPES[x.dtype], activation is not None),
    )
    check(loaded_library().moe_convolve_sequences(ctypes.byref(convolution), kernel_threads()))
    return y.transpose(1, 2)
