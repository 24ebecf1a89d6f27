"""The recurrent part of Mamba-2 (Nemotron 3, Granite 4) on the CPU, in calls of the C++ library.

For one token transformers makes a dozen passes over tensors as large as the state, for a prompt it expands
heads that share keys, and matrices of pairs of tokens, in fp32. The library goes from token to token, as the
recurrence says, and reads and writes the state once for some of them.
The layer's forward stays transformers' own; functions that it calls are replaced by the library's.
"""

from __future__ import annotations

import ctypes
import logging
import math
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from moe_local.cache.errors import first_line
from moe_local.offload.dense.convolution import (
    CONVOLUTION,
    PROMPT_CONVOLUTION,
    STARTS,
    convolve,
    convolve_sequences,
)
from moe_local.offload.dense.state_functions import (
    Function,
    functions_called,
    refuse,
    use_functions,
    with_functions,
)
from moe_local.offload.native.library import DTYPES, check, loaded_library
from moe_local.offload.native.linear_attention import Mamba2Scan
from moe_local.offload.system.threads import kernel_threads

UPDATE, SCAN = "mamba2_selective_state_update", "mamba2_chunk_scan"
NAMES = (UPDATE, SCAN, CONVOLUTION, PROMPT_CONVOLUTION)
"""The names by which transformers' forwards call the functions: for single tokens, and for several."""

STEP = 16
"""The width of keys must be a multiple of it."""

logger = logging.getLogger(__name__)


def use_native_mamba2(model: nn.Module) -> None:
    """Let the library compute the Mamba-2 layers of `model`, in CPU memory.

    For classes whose forward calls transformers' four functions by name, and where the library's functions
    give the same results.
    """
    use_functions(
        model, NAMES, _agrees, _native, lambda module: getattr(module, "ssm_state_size", 1) % STEP == 0
    )


def holds_no_states(module: Any) -> bool:
    """Whether a layer needs no memory for the states between the tokens of a prompt, since the library goes
    from one to the next."""
    return getattr(type(module), "scanned_by_library", False)


@cache
def _native(cls: Any) -> Any:
    functions = functions_called(cls, NAMES)
    assert functions is not None
    made = with_functions(cls, _native, dict(zip(NAMES, _library_functions(functions), strict=True)))
    made.scanned_by_library = True
    return made


def _library_functions(functions: list[Function]) -> list[Function]:
    """The library's functions in place of `functions`, as NAMES."""
    ours: list[Function] = [update_state, scan_sequences, convolve, convolve_sequences]
    return [partial(mine, other) for mine, other in zip(ours, functions, strict=True)]


def update_state(
    other: Function,
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The same as transformers' mamba2_selective_state_update, `other`, which is called for unsupported
    arguments: one token, which overwrites `state` [batch, H, P, N].

    `hidden_states` and `dt` [batch, H, P], `A` [H, P, N], `B` and `C` [batch, G, N], `D` and `dt_bias` [H, P]
    -> [batch, H, P]. But for `hidden_states`, the same for all of P and N: expanded, not copied.
    """
    expanded = (x for x in (dt[0], A[..., 0], A[:, 0], D, dt_bias) if x is not None)
    answer = None
    if z is None and all(map(_is_alike, expanded)):
        answer = _scan(
            *(hidden_states[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None]),
            *(None if x is None else x[:, 0] for x in (D, dt_bias)),
            state=state,
            softplus=dt_softplus,
        )
    if answer is None:
        given = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "z": z, **options}
        found: torch.Tensor = other(state, hidden_states, dt, A, B, C, D, **given)
        return found
    return answer[:, 0].to(hidden_states.dtype)


def scan_sequences(
    other: Function,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    **options: Any,
) -> Any:
    """The same as transformers' mamba2_chunk_scan, `other`, which is called for unsupported arguments.

    `hidden_states` [batch, T, H, P], `dt` [batch, T, H], `A`, `D` and `dt_bias` [H], `B` and `C`
    [batch, T, G, N]; the state, fp32 [batch, H, P, N] or None for zeros, is overwritten. Returns the answers,
    fp32 [batch, T, H, P], and, with `return_final_states`, the state.
    """
    state, answer = initial_states, None
    if state is None and hidden_states.is_cpu:
        state = torch.zeros(len(B), *hidden_states.shape[2:], B.shape[-1])
    plain = all(options.get(name) is None for name in (*STARTS, "z"))
    if state is not None and return_final_states and plain:
        answer = _scan(
            *(hidden_states, dt, A, B, C, D, dt_bias),
            state=state,
            softplus=dt_softplus,
            limits=dt_limit,
        )
    if answer is None:
        return other(
            *(hidden_states, dt, A, B, C, chunk_size, D, dt_bias, initial_states, dt_softplus, dt_limit),
            return_final_states=return_final_states,
            **options,
        )
    return answer, state


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    *,
    state: torch.Tensor,
    softplus: bool,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> torch.Tensor | None:
    """The answers, fp32, as in `scan_sequences`, while `state` is overwritten; None if the library does not
    support the arguments, and then nothing is changed."""
    rows, tokens, heads, width = x.shape
    groups, states = B.shape[2:]
    of_heads = [A, *(each for each in (D, dt_bias) if each is not None)]
    if (
        not rows * tokens
        or not all(each.is_cpu for each in (x, dt, B, C, state, *of_heads))
        or not x.dtype is dt.dtype is B.dtype is C.dtype
        or x.dtype not in DTYPES
        or state.dtype is not torch.float32
        or state.shape != (rows, heads, width, states)
        or not state.is_contiguous()
        or states % STEP
        or heads % groups
        or not B.shape == C.shape == (rows, tokens, groups, states)
        or dt.shape != (rows, tokens, heads)
        or any(each.shape != (heads,) for each in of_heads)
    ):
        return None
    (x, x_stride), (dt, dt_stride), (B, b_stride), (C, c_stride) = map(_apart, (x, dt, B, C))
    if b_stride != c_stride:
        B, C, b_stride = B.contiguous(), C.contiguous(), groups * states
    A = A.float().contiguous()
    D = None if D is None else D.float().contiguous()
    dt_bias = None if dt_bias is None else dt_bias.to(dt.dtype).contiguous()
    y = torch.empty(rows, tokens, heads, width)
    scan = Mamba2Scan(
        *(each.data_ptr() for each in (x, B, C, dt)),
        *(None if dt_bias is None else dt_bias.data_ptr(), A.data_ptr(), None if D is None else D.data_ptr()),
        *(state.data_ptr(), y.data_ptr(), x_stride, b_stride, dt_stride),
        *(rows, tokens, heads, groups, width, states, *limits, DTYPES[x.dtype], softplus),
    )
    check(loaded_library().moe_mamba2_scan(ctypes.byref(scan), kernel_threads()))
    return y


def _apart(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [B, T, ...], or a copy, in which a token's numbers lie together and tokens equally far apart; and how
    many numbers that is."""
    rows, tokens = x.shape[:2]
    numbers, (row, token, *rest) = x[0, 0].numel(), x.stride()
    token = row if tokens == 1 else token
    if rest == [*x.shape[3:], 1] and (rows == 1 or row == tokens * token):
        return x, token
    return x.contiguous(), numbers


def _is_alike(values: torch.Tensor) -> bool:
    """Whether a tensor is the same along its last dimension."""
    return values.shape[-1] == 1 or values.stride(-1) == 0


def _agrees(functions: list[Function]) -> bool:
    """Whether these functions and the library's give the same results, up to rounding."""
    reason = "it differs"
    try:
        wanted, found = map(_trial, (functions, _library_functions([refuse] * len(NAMES))))
        agree = all(torch.allclose(*pair, atol=1e-4) for pair in zip(found, wanted, strict=True))
    except Exception as error:  # another release's functions may reject these arguments in any way
        agree, reason = False, f"{type(error).__name__}: {first_line(error)}"
    if not agree:
        logger.info("Mamba-2 is computed by transformers: %s", reason)
    return agree


@torch.inference_mode()
def _trial(functions: list[Function]) -> list[torch.Tensor]:
    """The functions' results, and the states that they leave, for two prompts, then two single tokens of two
    sequences."""
    update, scan, convolution, prompt_convolution = functions
    generator = torch.Generator().manual_seed(1)
    heads, groups, width, keys = 4, 2, 6, 32

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    inputs, weight, bias = draw(2, 6, 4), draw(6, 4), draw(6)
    decay, skip, added = -draw(heads).abs(), draw(heads), draw(heads)
    found: list[torch.Tensor] = []
    state: Any = None
    # The first prompt is longer than the block of transformers' function; the second has limits.
    for tokens, limits in ((21, (0.0, math.inf)), (3, (0.3, 1.0))):
        answer, state = scan(
            *(draw(2, tokens, heads, width), draw(2, tokens, heads), decay),
            *(draw(2, tokens, groups, keys) for _ in "BC"),
            chunk_size=8,
            D=skip,
            z=None,
            return_final_states=True,
            dt_bias=added,
            dt_softplus=True,
            initial_states=state,
            dt_limit=limits,
        )
        moved = prompt_convolution(draw(2, 6, tokens), weight, bias, activation="silu")
        found += [answer, state.clone(), moved]
    for _ in range(2):
        answer = update(
            *(state, draw(2, heads, width), draw(2, heads, 1).expand(-1, -1, width)),
            decay[:, None, None].expand(-1, width, keys),
            *(draw(2, groups, keys) for _ in "BC"),
            skip[:, None].expand(-1, width),
            z=None,
            dt_bias=added[:, None].expand(-1, width),
            dt_softplus=True,
        )
        moved = convolution(draw(2, 6, 1), inputs, weight, bias, activation="silu")
        found += [answer, state.clone(), moved, inputs.clone()]
    return found
