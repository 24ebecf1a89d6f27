"""One token through a Mamba-2 layer on the CPU: three passes over its state where transformers makes a dozen.

transformers computes the step from tensors as large as the state, and the convolution of a single token by a
function for images. Both are most of a token's time in Nemotron 3 and Granite 4.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from moe_local.offload.modeling.stand_in import calling

UPDATE, CONVOLVE = "mamba2_selective_state_update", "causal_conv1d_update"
"""transformers' functions, which serve other devices, and what is not served here."""


def stepping(cls: Any) -> Callable[..., Any] | None:
    """The forward of a class of layers with the functions below in place of transformers'; None for classes
    that use others."""
    forward: Any = inspect.unwrap(cls.forward)
    known = forward.__globals__
    if not {UPDATE, CONVOLVE} <= {*forward.__code__.co_names} & known.keys():
        return None
    own = {UPDATE: partial(update_state, known[UPDATE]), CONVOLVE: partial(convolve, known[CONVOLVE])}
    return calling(forward, own)


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


def convolve(
    usual: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The causal convolution of one token after those in `conv_state` [batch, C, K], which it joins.

    `hidden_states` [batch, C, 1], `weight` [C, K], `bias` [C] -> [batch, C, 1]. What is on a GPU, or has
    several tokens or another activation than SiLU, goes to the `usual` function.
    """
    served = conv_state.is_cpu and hidden_states.shape[-1] == 1 and conv_state.shape[-1] == weight.shape[-1]
    if not served or activation not in ("silu", "swish"):
        return usual(hidden_states, conv_state, weight, bias, activation)
    conv_state.copy_(torch.cat([conv_state[..., 1:], hidden_states], dim=-1))
    sums = (conv_state.float() * weight.float()).sum(dim=-1, keepdim=True)
    if bias is not None:
        sums += bias.float()[:, None]
    return functional.silu(sums.to(weight.dtype)).to(hidden_states.dtype)


def _is_alike(values: torch.Tensor) -> bool:
    """Whether a tensor is the same along its last dimension."""
    return values.shape[-1] == 1 or values.stride(-1) == 0
