"""Mamba-2's layers on the CPU: for one token three passes over the state where transformers makes a dozen.

transformers computes the step from tensors as large as the state, and the convolution by a function for
images. Both are most of a token's time in Nemotron 3 and Granite 4.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from moe_local.offload.dense.convolution import (
    CONVOLUTION,
    PROMPT_CONVOLUTION,
    convolve,
    convolve_sequences,
)
from moe_local.offload.modeling.stand_in import calling
from moe_local.offload.native.library import library

UPDATE = "mamba2_selective_state_update"
"""transformers' function, which serves other devices, and what is not served here."""


def stepping(cls: Any) -> Callable[..., Any] | None:
    """The forward of a class of layers with our functions in place of transformers'; None for classes that
    use others."""
    forward: Any = inspect.unwrap(cls.forward)
    ours: dict[str, Callable[..., Any]] = {UPDATE: update_state}
    if library() is not None:
        ours |= {CONVOLUTION: convolve, PROMPT_CONVOLUTION: convolve_sequences}
    usual = {name: forward.__globals__[name] for name in ours if name in forward.__code__.co_names}
    if UPDATE not in usual:
        return None
    return calling(forward, {name: partial(ours[name], other) for name, other in usual.items()})


def update_state(
    usual: Callable[..., torch.Tensor],
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """One step of Mamba-2 (arXiv 2405.21060, section 6), which overwrites `state` [batch, H, P, N].

    `hidden_states` and `dt` [batch, H, P], `A` [H, P, N], `B` and `C` [batch, G, N], `D` and `dt_bias` [H, P]
    -> [batch, H, P]. But for `hidden_states`, the same for all of P and N; others go to the `usual` function.

        state = exp(dt A) state + dt B x        y = C state + D x
    """
    bias, softplus = options.get("dt_bias"), options.get("dt_softplus", False)
    skips = torch.zeros(()).expand(A.shape[:2]) if D is None else D
    biases = torch.zeros((), dtype=dt.dtype).expand(A.shape[:2]) if bias is None else bias
    alike = all(map(_is_alike, (dt[0], A[..., 0], skips, biases))) and _is_alike(A[:, 0])
    if not (alike and state.is_cpu and state.dtype is torch.float32 and options.get("z") is None):
        return usual(state, hidden_states, dt, A, B, C, D, **options)
    steps = dt[..., 0] + biases[:, 0].to(dt.dtype)
    steps = (functional.softplus(steps) if softplus else steps).float()
    x, heads = hidden_states.float(), A.shape[0] // B.shape[1]
    keys, queries = (part.float().repeat_interleave(heads, dim=1) for part in (B, C))
    state.mul_((steps * A[:, 0, 0].float()).exp_()[..., None, None])
    state.addcmul_((steps[..., None] * x)[..., None], keys[:, :, None])
    answer = (state @ queries[..., None]).squeeze(-1)
    return answer.addcmul_(x, skips[:, :1].float()).to(hidden_states.dtype)


def _is_alike(values: torch.Tensor) -> bool:
    """Whether a tensor is the same along its last dimension."""
    return values.shape[-1] == 1 or values.stride(-1) == 0
