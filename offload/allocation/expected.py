"""The expected error of a format for a model whose weights are not known: its error on typical weights.

Trained weights have heavier tails than normal ones; Student's t with 5 degrees of freedom models them.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from moe_local.offload.allocation.knapsack import Option, hull
from moe_local.offload.quantize.codec import codec_for, codecs
from moe_local.offload.quantize.layout import TensorSpec

ROWS, COLUMNS = 256, 1024
DEGREES = 5.0

NATS_PER_ERROR = 2.5
"""What a unit of relative squared error of the expert matrices adds to the logarithm of perplexity. Derived
from Mixtral 8x7B with experts in 4, 3 and 2.6 bits and all else in fp16 (arXiv 2312.17238, table 1:
perplexities 3.67, 3.96 and 4.52 against 3.59). The errors of these formats on normal weights are about .0085,
.036 and .1, which gives 2.6, 2.7 and 2.3. Errors add, so the same holds for mixes."""


@cache
def _weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    squares = torch.randn(int(DEGREES), ROWS, COLUMNS, generator=generator).square().mean(0)
    return 0.02 * normal / squares.sqrt()


@cache
def format_error(format: str) -> float:
    """The squared error of a matrix in `format`, relative to its squared weights."""
    codec, weights = codec_for(format), _weights()
    layout = codec.layout((TensorSpec("w", (ROWS, COLUMNS)),))
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    codec.encode({"w": weights}, layout, buffer)
    decoded = codec.decode(buffer, layout, torch.float32)["w"]
    return float((decoded - weights).square().sum() / weights.square().sum())


@cache
def format_bits(format: str) -> float:
    """Bits per weight, scales included, of a large matrix."""
    layout = codec_for(format).layout((TensorSpec("w", (4096, 4096)),))
    return 8 * layout.nbytes / 4096**2


@lru_cache(maxsize=8)
def candidates(dtype: torch.dtype) -> tuple[str, ...]:
    """The formats worth choosing from for weights stored in `dtype`, fewest bits first.

    These are the formats of quantizing codecs whose error no mix of two others of the same size beats, and
    the format that keeps the weights as they are.
    """
    kept = {torch.float16: "fp16"}.get(dtype, "bf16")
    names = [name for name, codec in codecs().items() if not codec.exact] + [kept]
    options = [
        Option(round(1000 * format_bits(name)), 0.0 if name == kept else format_error(name)) for name in names
    ]
    return tuple(names[index] for index in hull(options))
