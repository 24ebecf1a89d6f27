"""The recurrent parts of linear attention, in two calls of the C++ library.

Gated DeltaNet layers (Qwen3-Next, Qwen3.5) have a state of some megabytes in place of keys and values.
transformers' own code, in some fifty operations, reads or writes it eight times per token, the library once.
Of a prompt, transformers' takes 64 tokens at a time, in as many operations on matrices of fp32.
The layer's forward stays transformers' own; four functions that it calls are replaced by the library's.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
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
from moe_local.offload.native.linear_attention import DeltaRule
from moe_local.offload.system.threads import kernel_threads

RULE, PROMPT_RULE = "torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"
NAMES = (RULE, CONVOLUTION, PROMPT_RULE, PROMPT_CONVOLUTION)
"""The names by which transformers' forwards call the functions: for single tokens, and for several."""

STEP = 16
"""The width of values must be a multiple of it."""

logger = logging.getLogger(__name__)


def use_native_delta_rule(model: nn.Module) -> None:
    """Let the library compute the linear attention of `model`, in CPU memory.

    For classes whose forward calls transformers' four functions by name, and where the library's functions
    give the same results.
    """
    use_functions(model, NAMES, _agrees, _native)


@cache
def _native(cls: Any) -> Any:
    functions = functions_called(cls, NAMES)
    assert functions is not None
    return with_functions(cls, _native, dict(zip(NAMES, _library_functions(functions), strict=True)))


def _library_functions(functions: list[Function]) -> list[Function]:
    """The library's functions in place of `functions`, as NAMES."""
    ours: list[Function] = [delta_rule, convolve, delta_rule, convolve_sequences]
    return [partial(mine, other) for mine, other in zip(ours, functions, strict=True)]


def delta_rule(
    other: Function,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same as transformers' torch_recurrent_gated_delta_rule or torch_chunk_gated_delta_rule: `other`,
    which is called for unsupported arguments.

    query, key [B, T, Hk, Dk], value [B, T, Hv, Dv], g (fp32) and beta [B, T, Hv]; the state, fp32
    [B, Hv, Dk, Dv] or None for zeros, is overwritten and returned beside the answers, [B, T, Hv, Dv].
    """
    rows, tokens, key_heads, key_width = key.shape
    value_heads, value_width = value.shape[2:]
    state = initial_state
    if state is None and output_final_state:
        state = torch.zeros(rows, value_heads, key_width, value_width, dtype=torch.float32)
    if (
        state is None
        or not rows * tokens
        or not output_final_state
        or any(options.get(name) is not None for name in STARTS)
        or not query.dtype is key.dtype is value.dtype is beta.dtype
        or value.dtype not in DTYPES
        or not g.dtype is state.dtype is torch.float32
        or state.shape != (rows, value_heads, key_width, value_width)
        or not state.is_contiguous()
        or value_width % STEP
        or query.shape != key.shape
        or value.shape[:2] != key.shape[:2]
        or value_heads % key_heads
        or not g.shape == beta.shape == value.shape[:3]
    ):
        answer: tuple[torch.Tensor, torch.Tensor | None] = other(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **options,
        )
        return answer
    query, key, value = _in_order(query), _in_order(key), _in_order(value)
    if query.stride(1) != key.stride(1):
        query, key = query.contiguous(), key.contiguous()
    beta, g = beta.contiguous(), g.contiguous()
    output = torch.empty(value.shape, dtype=value.dtype)
    rule = DeltaRule(
        *(x.data_ptr() for x in (query, key, value, beta, g, state, output)),
        *(key.stride(1), value.stride(1)),
        *(rows, tokens, key_heads, value_heads, key_width, value_width),
        *(DTYPES[value.dtype], use_qk_l2norm_in_kernel),
    )
    check(loaded_library().moe_delta_rule(ctypes.byref(rule), kernel_threads()))
    return output, state


def _in_order(x: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D], or a copy, in which a token's numbers lie together and tokens equally far apart."""
    rows, tokens, heads, width = x.shape
    row, token, *rest = x.stride()
    apart = token >= heads * width and (rows == 1 or row == tokens * token)
    # Unlike `contiguous`, this also sets the stride of a single token.
    return x if apart and rest == [width, 1] else x.clone(memory_format=torch.contiguous_format)


def _agrees(functions: list[Function]) -> bool:
    """Whether these functions and the library's give the same results, up to rounding."""
    reason = "it differs"
    try:
        agree = _same(functions, key_heads=4)
        if agree:
            with contextlib.suppress(RuntimeError):  # in transformers 5.17 the caller repeats the heads
                agree = _same(functions, key_heads=2)
    except Exception as error:  # another release's functions may reject these arguments in any way
        agree, reason = False, f"{type(error).__name__}: {first_line(error)}"
    if not agree:
        logger.info("linear attention is computed by transformers: %s", reason)
    return agree


def _same(functions: list[Function], *, key_heads: int) -> bool:
    wanted = _trial(functions, key_heads)
    found = _trial(_library_functions([refuse] * len(NAMES)), key_heads)
    return all(torch.allclose(*pair, atol=1e-4) for pair in zip(found, wanted, strict=True))


@torch.inference_mode()
def _trial(functions: list[Function], key_heads: int) -> list[torch.Tensor]:
    """The functions' results, and the states that they leave, for two prompts, then two single tokens of two
    sequences."""
    rule, convolution, prompt_rule, prompt_convolution = functions
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    inputs, weight, bias = draw(2, 6, 4), draw(6, 4), draw(6)
    found: list[torch.Tensor] = []
    state: Any = None
    # The first prompt is longer than the block of transformers' function.
    for tokens, normalized in ((70, True), (3, False), (1, True), (1, False)):
        size = 1e-3 if normalized else 0.1  # so small that the epsilon added to norms shows
        answer, state = (rule if tokens == 1 else prompt_rule)(
            *(size * draw(2, tokens, key_heads, 32) for _ in "qk"),
            draw(2, tokens, 4, 16),
            g=-draw(2, tokens, 4).abs(),
            beta=draw(2, tokens, 4).sigmoid(),
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=normalized,
        )
        x, options = draw(2, 6, tokens), (bias, "silu") if normalized else (None, None)
        if tokens == 1:
            moved = convolution(x, inputs, weight, *options)
        else:
            moved = prompt_convolution(x, weight, options[0], activation=options[1])
        found += [answer, state.clone(), moved, inputs.clone()]
    return found
