"""GGUF's block formats against the `gguf` package, which is llama.cpp's own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from moe_local.offload.quantize import gguf as decoders
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.gguf import FORMATS, dequantize_gguf
from moe_local.offload.quantize.gguf_grids import GRIDS, patterns
from moe_local.offload.quantize.layout import TensorSpec
from support import gguf_models


@pytest.mark.parametrize("format", FORMATS)
def test_random_blocks_decode_to_the_same_bits(format: str) -> None:
    """Every byte is random: all bits of quants and small scales; float16 scales are kept finite."""
    numbers, nbytes, _ = FORMATS[format]
    kind = gguf.GGMLQuantizationType[format]
    assert gguf.GGML_QUANT_SIZES[kind] == (numbers, nbytes)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 5, 4, nbytes), np.uint8)
    if format == "MXFP4":
        raw[..., 0] = rng.integers(0, 253, raw.shape[:-1])  # larger exponents overflow float32
        raw[0, 0, :, 0] = 0, 1, 2, 252
    if format == "NVFP4":
        raw[..., :4] = rng.integers(0, 255, (*raw.shape[:-1], 4))  # llama.cpp's decoders differ about 255
        raw[0, 0, :, 0] = 0, 1, 127, 128
    for at in places(format):
        gguf_models.put_scale(raw, format, at, rng.normal(0, 0.1, raw.shape[:-1]).astype(np.float16))
    rows = raw.reshape(3, 5, -1)
    found = dequantize_gguf(torch.from_numpy(rows.copy()), format)
    assert found.shape == (3, 5, 4 * numbers)
    expected = gguf.quants.dequantize(rows.reshape(15, -1), kind).reshape(found.shape)
    assert torch.equal(found, torch.from_numpy(expected))
    assert torch.isfinite(found).all()


def places(format: str) -> tuple[int, ...]:
    """Where the float16 scales of a block are."""
    others = {"Q4_1": (0, 2), "Q5_1": (0, 2), "MXFP4": (), "NVFP4": (), "TQ1_0": (52,), "TQ2_0": (64,)}
    return {**gguf_models.HALVES, **others}.get(format, (0,))


@pytest.mark.parametrize("format", [format for format in FORMATS if places(format)])
def test_scales_that_are_no_numbers(format: str) -> None:
    """NaN and infinity reach every number that they reach in llama.cpp, and no other block."""
    raw = np.random.default_rng(2).integers(0, 256, (5, FORMATS[format].nbytes), np.uint8)
    for at in places(format):
        scales = np.array([0.5, np.nan, np.inf, -np.inf, -0.5], np.float16)
        gguf_models.put_scale(raw, format, at, scales)
    with np.errstate(invalid="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[format]))
    found = dequantize_gguf(torch.from_numpy(raw), format)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.isfinite().all(1).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("format", GRIDS)
def test_grids(format: str) -> None:
    theirs = getattr(gguf.quants, format)
    theirs.init_grid()
    assert torch.equal(patterns(format).float(), torch.from_numpy(theirs.grid[0, 0]))


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, of which the last is smaller; one block, at an odd address; none."""
    for format, (numbers, nbytes, _) in FORMATS.items():
        raw = (torch.arange(5 * nbytes + 1) % 113).to(torch.uint8)[1:]  # no half of such bytes is NaN
        whole = dequantize_gguf(raw, format)
        with monkeypatch.context() as patched:
            patched.setattr(decoders, "CHUNK", 2 * numbers)
            assert torch.equal(dequantize_gguf(raw, format), whole)
        assert torch.equal(dequantize_gguf(raw[-nbytes:], format), whole[-numbers:])
        assert dequantize_gguf(raw.view(1, -1)[:0], format).shape == (0, 5 * numbers)


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
