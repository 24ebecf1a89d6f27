"""GGUF's block formats against the `gguf` package, which is llama.cpp's own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.gguf import FORMATS, dequantize_gguf
from moe_local.offload.quantize.layout import TensorSpec


@pytest.mark.parametrize("format", FORMATS)
def test_random_blocks_decode_to_the_same_bits(format: str) -> None:
    """Every byte is random: all bits of quants and small scales; float16 scales are kept finite."""
    numbers, nbytes, _ = FORMATS[format]
    kind = gguf.GGMLQuantizationType[format]
    assert gguf.GGML_QUANT_SIZES[kind] == (numbers, nbytes)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 5, 4, nbytes), np.uint8)
    halves: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
    }
    if format == "MXFP4":
        raw[..., 0] = rng.integers(0, 253, raw.shape[:-1])  # larger exponents overflow float32
        raw[0, 0, :, 0] = 0, 1, 2, 252
    for at in () if format == "MXFP4" else halves.get(format, (0,)):
        scales = rng.normal(0, 0.1, raw.shape[:-1]).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    rows = raw.reshape(3, 5, -1)
    found = dequantize_gguf(torch.from_numpy(rows.copy()), format)
    assert found.shape == (3, 5, 4 * numbers)
    expected = gguf.quants.dequantize(rows.reshape(15, -1), kind).reshape(found.shape)
    assert torch.equal(found, torch.from_numpy(expected))
    assert torch.isfinite(found).all()


def test_mxfp4_is_encoded_again_without_loss() -> None:
    """Any code and any scale whose numbers float32 and our codec can represent decode to the same numbers."""
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (512, 2, 17), np.uint8)
    raw[..., 0] = rng.integers(0, 253, raw.shape[:-1])
    raw[:8, :, 1:] &= np.uint8(0x99)  # no code above a half, and both zeros
    raw[8:16, 0, 0] = np.arange(8)
    weights = dequantize_gguf(torch.from_numpy(raw.reshape(512, -1)), "MXFP4")
    codec, tensor = codec_for("mxfp4"), TensorSpec("down_proj", (512, 64))
    layout = codec.layout([tensor])
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    codec.encode({"down_proj": weights}, layout, buffer)
    assert torch.equal(codec.decode(buffer, layout, torch.float32)["down_proj"], weights)
