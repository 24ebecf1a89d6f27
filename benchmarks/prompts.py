"""How fast are a prompt's parts outside of the experts, on the CPU, beside torch's or transformers' own?

Method. Random inputs of a dtype, by default bf16, in the widths of published models. In each round both ways
compute each part in turn; a round that warms up does not count.
  attention    all queries of a prompt, or of its last chunk behind earlier tokens: dense/prompt_attention.py,
               and torch's scaled_dot_product_attention with the same mask, or is_causal where it is enough
               (keys are as many), and enable_gqa where heads share keys. torch skips no key behind a mask,
               and has no kernel for values narrower than keys: dense/attention.py cuts the former into blocks
               and pads the latter where it must use torch, which is faster than what is shown here
  window       the same, each query seeing so many keys
  delta rule   Gated DeltaNet's chunk of a prompt: dense/delta_rule.py, and transformers' function
  convolution  the one in front of it, likewise
  norm         an RMS norm of all tokens: dense/norm.py, and transformers' module
ms: of a call, the median over rounds, with the lowest and highest; times faster: the median of the rounds'
ratios with its 95 % interval (ratio.py). Both use as many threads as torch.

Run: python benchmarks/prompts.py [--parts attention] [--isa avx2] [--dtype fp16] [--rounds 9] [--json FILE]
The last line printed is one JSON object; --json also writes it to FILE.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import moe_local  # noqa: F401 - before torch, so that torch's idle threads do not spin

# isort: split

import torch
from instruction_set import FOR_TORCH, missing, use
from ratio import Ratio
from report import finish, in_rounds, parser_of, versions
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from moe_local.offload.dense import delta_rule
from moe_local.offload.dense.norm import Kind, native_norm
from moe_local.offload.dense.prompt_attention import prompt_attention
from moe_local.offload.native.library import ISAS, library
from moe_local.offload.plan.bandwidth import machine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ATTENTION = {
    "Qwen3-30B-A3B": (32, 4, 128, 128),
    "Mixtral 8x7B": (32, 8, 128, 128),
    "GLM-4.7-Flash": (20, 20, 256, 256),
    "DeepSeek-V3": (128, 128, 192, 128),
}
"""Heads, key heads, width of keys and of values."""

SPANS = ((128, 128), (1024, 1024), (1024, 4096))
"""Queries and keys."""

Way = Callable[[], Any]


class Case(NamedTuple):
    part: str
    shape: str
    ours: Way
    others: Way


def attention(dtype: torch.dtype) -> Iterator[Case]:
    for name, (heads, kv_heads, width, value_width) in ATTENTION.items():
        for queries, keys in SPANS:
            query = draw(dtype, queries, heads, width).transpose(1, 2)
            key, value = draw(dtype, kv_heads, keys, width), draw(dtype, kv_heads, keys, value_width)
            mask = None if queries == keys else seen(queries, keys)
            yield Case("attention", f"{name}, {queries} of {keys}", *ways(query, key, value, mask))


def window(dtype: torch.dtype) -> Iterator[Case]:
    query = draw(dtype, 1024, 64, 64).transpose(1, 2)
    key, value = draw(dtype, 8, 4096, 64), draw(dtype, 8, 4096, 64)
    mask = seen(1024, 4096, 128)
    yield Case("window", "gpt-oss, 1024 of 4096, each 128", *ways(query, key, value, mask))


def ways(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> tuple[Way, Way]:
    def ours() -> Any:
        answer = prompt_attention(query, key, value, mask)
        assert answer is not None, "the library does not attend here"
        return answer

    def others() -> Any:
        shares = query.shape[1] > key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=shares
        )

    return ours, others


def linear(dtype: torch.dtype) -> Iterator[Case]:
    """The parts of Gated DeltaNet in Qwen3.6-35B-A3B."""
    for tokens in (128, 512):
        query, key = (draw(dtype, tokens, 16, 128) for _ in "qk")
        given = query, key, draw(dtype, tokens, 32, 128)
        options = {
            "g": -torch.rand(1, tokens, 32, dtype=torch.float32),
            "beta": draw(dtype, tokens, 32).sigmoid(),
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
        }
        rule: Any = qwen3_next.torch_chunk_gated_delta_rule
        yield Case(
            "delta rule",
            f"{tokens} tokens",
            partial(delta_rule.delta_rule, rule, *given, **options),
            partial(rule, *(x.repeat_interleave(2, dim=2) for x in given[:2]), given[2], **options),
        )
        x, weight = draw(dtype, tokens, 8192).transpose(1, 2), draw(dtype, 8192, 4)[0]
        convolve: Any = qwen3_next.causal_conv1d_fn
        yield Case(
            "convolution",
            f"{tokens} tokens, 8192 channels",
            partial(delta_rule.convolve_sequences, convolve, x, weight, None, "silu"),
            partial(convolve, x, weight, None, activation="silu"),
        )


def norm(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, width in ((1024, 2048), (32 * 1024, 128)):
        module, x = Qwen3MoeRMSNorm(width, 1e-6).to(dtype).requires_grad_(False), draw(dtype, tokens, width)
        kind = Kind(1e-6, shifted=False)
        yield Case(
            "norm",
            f"{tokens} x {width}",
            partial(native_norm, x, module.weight, kind),
            partial(module, x),
        )


PARTS = {"attention": attention, "window": window, "linear": linear, "norm": norm}


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, dtype=torch.float32).to(dtype)


def seen(queries: int, keys: int, window: int | None = None) -> torch.Tensor:
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    return mask if window is None else mask & torch.ones_like(mask).triu(keys - queries - window + 1)


def timed(way: Way) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        way()
        return time.perf_counter() - start

    return measure


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    if options.isa is not None:
        use(options.isa)
    rows = []
    print(f"{'':47} {'ms':>24} {'torch, transformers':>24}   times faster (95 %)")
    for part in options.parts:
        for case in PARTS[part](DTYPES[options.dtype]):
            found = in_rounds({"ours": timed(case.ours), "others": timed(case.others)}, options.rounds)
            ms = {name: [1e3 * second for second in seconds] for name, seconds in found.items()}
            ratio = Ratio.of(found["others"], found["ours"])
            rows.append({"part": case.part, "shape": case.shape, "ms": ms, "times_faster": ratio.to_dict()})
            print(line(case, ms, ratio), flush=True)
    document = {
        "machine": machine(),
        **versions(),
        "threads": torch.get_num_threads(),
        "isa": options.isa,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "cases": rows,
    }
    finish(document, options.json)


def line(case: Case, ms: dict[str, list[float]], ratio: Ratio) -> str:
    spans = [f"{statistics.median(of):.2f} ({min(of):.2f}, {max(of):.2f})" for of in ms.values()]
    return f"{case.part:12} {case.shape:34} {spans[0]:>24} {spans[1]:>24}   {ratio}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, rounds=9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    parser.add_argument("--isa", choices=FOR_TORCH, help="the instruction set to use; default: the best")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    lib = library()
    if lib is None or lib.moe_isa() == ISAS.index("portable"):
        sys.exit("prompts.py needs the C++ library, and a processor with AVX2")
    if options.isa is not None and (variables := missing(options.isa)):
        sys.exit(f"for torch to use no more than {options.isa}, set {variables}")
    return options


if __name__ == "__main__":
    main()
