"""A pytest plugin, loaded by `run` beside this file: tests for a GPU find one, whose work the CPU does.

`devices.cpp` and `streams.cpp` take the place of CUDA's runtime, `operators.cpp` that of PyTorch's CUDA
kernels. Here is what they cannot know: operators that only a GPU has, and Triton's kernels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import emulated_operators as emulated  # built by `run`
import pytest
import torch
from torch import Tensor

LSE_STEP = 32
"""Memory-efficient attention returns logarithms for this many queries, or a multiple."""


WORKSPACE = 8 * 1024 * 1040
"""Bytes that PyTorch gives cuBLAS a stream on GPUs before Hopper."""


LACKING = {
    "test_levels_that_are_shuffled_are_those_that_are_loaded": "Triton's interpreter knows no assembly",
    "test_attention_to_long_rows": "flash attention is not among its operations",
    "test_copies_behind_a_slower_link": "copies take the time that the CPU takes",
    "test_a_copy_waits_for_readers_and_kernels_for_the_copy": "no stream runs beside another",
}
"""Tests that are skipped here, and what the emulated GPU lacks for them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = LACKING.get(getattr(item, "originalname", item.name))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"on the emulated GPU {reason}"))


def _on(device: torch.device, work: Callable[..., None], *tensors: Tensor | None) -> None:
    """Let work be done on the tensors' memory, when the device's current stream gets to it."""
    shown = [None if tensor is None else emulated.shown(tensor) for tensor in tensors]
    emulated.put(device.index, lambda: work(*shown))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of [B, H, S, D] and the logarithm of its weights' sum [B, H, S], in fp32.

    As CUDA's kernel, which counts in powers of two: of a query whose scores are then all -inf, as the least
    numbers of bf16 and fp32 are, both are 0.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (part.float().repeat_interleave(groups, 1) for part in (key, value))
    scores = query.float() @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    hidden = (scores.amax(-1) * math.log2(math.e)).isneginf()
    output = scores.softmax(-1).masked_fill(hidden[..., None], 0) @ value
    return output, scores.logsumexp(-1).masked_fill(hidden, 0)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    queries: int,
) -> tuple[Tensor, Tensor]:
    """Both of `_attend`, in memory of the device; `queries`: for how many there are logarithms."""
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    logs = query.new_empty(batch, heads, queries, dtype=torch.float32)

    def work(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, logs: Tensor
    ) -> None:
        found, found_logs = _attend(query, key, value, bias, causal, scale)
        out.copy_(found)
        if queries:
            logs.fill_(math.inf)[..., :length].copy_(found_logs)

    _on(query.device, work, query, key, value, bias, out, logs)
    return out, logs


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries = -(-query.shape[2] // LSE_STEP) * LSE_STEP if compute_log_sumexp else 0
    out, logs = _attention(query, key, value, attn_bias, is_causal, scale, queries)
    seed = query.new_empty((), dtype=torch.int64)
    return out, logs, seed, seed.clone()


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    out, logs = _attention(query, key, value, None, is_causal, scale, query.shape[2])
    state, unused = query.new_empty(2, dtype=torch.uint64), query.new_empty((), dtype=torch.uint64)
    empty = query.new_empty(0)
    return out, logs, None, None, query.shape[2], key.shape[2], state, unused, empty


def multiply(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A product of matrices, or of batches of them, whose sums keep another type than the factors."""
    out = left.new_empty(*left.shape[:-1], right.shape[-1], dtype=out_dtype)
    _on(left.device, lambda a, b, out: out.copy_(a.float() @ b.float()), left, right, out)
    return out


def convolve_depthwise(
    x: Tensor,
    weight: Tensor,
    kernel_size: list[int],
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])

    out = convolve(
        *(None if part is None else torch.empty_like(part, device="meta") for part in (x, weight, bias))
    )
    out = torch.empty_like(out, device=x.device)
    _on(x.device, lambda x, w, b, out: out.copy_(convolve(x, w, b)), x, weight, bias, out)
    return out


_workspaces: dict[tuple[int, int], Tensor] = {}


def blas_handle() -> int:
    """No handle, but what cuBLAS takes of VRAM for a stream, which stays: PyTorch's own figure."""
    stream = torch.cuda.current_stream()
    place = stream.device_index, stream.cuda_stream
    if place not in _workspaces:
        _workspaces[place] = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
    return 1


def _interpret_on_cpu() -> None:
    """Let Triton's interpreter see CUDA tensors as the CPU's, and captures remember its kernels."""
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def shown(value: Any) -> Any:
        return emulated.shown(value) if isinstance(value, Tensor) else value

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        args = tuple(shown(value) for value in args)
        kwargs = {name: shown(value) for name, value in kwargs.items()}
        emulated.put(torch.cuda.current_device(), lambda: run(self, *args, **kwargs))

    interpreter.GridExecutor.__call__ = call


def _install() -> None:
    torch.set_num_threads(1)  # the works are small
    torch.cuda.init()
    emulated.take("aten")
    emulated.take_copies()
    library = torch.library.Library("aten", "IMPL")
    for name, function in (
        ("_scaled_dot_product_efficient_attention", efficient_attention),
        ("_scaled_dot_product_flash_attention", flash_attention),
        ("mm.dtype", multiply),
        ("bmm.dtype", multiply),
        ("_conv_depthwise2d", convolve_depthwise),
    ):
        library.impl(name, function, "CUDA", with_keyset=False, allow_override=True)
    globals()["_library"] = library  # what it registered goes with it
    torch.cuda.current_blas_handle = blas_handle
    _interpret_on_cpu()
    if os.environ.get("EMULATED_CUDA_KERNELS") != "triton":
        from emulated_grouped import install

        install()
    try:
        import bitsandbytes  # noqa: F401 - registers its operators
    except Exception:
        return
    emulated.take("bitsandbytes")


_install()
