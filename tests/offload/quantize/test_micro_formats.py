"""MXFP4 and FP8 as codecs: the nearest numbers at scales that their definitions allow, and errors' bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize import parallel
from moe_local.offload.quantize.codec import codec_for, decoder_for
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.stored import StoredFormat
from moe_local.offload.quantize.views import views_of

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
"""OCP Microscaling Formats 1.0, table 5."""

SHAPES = [(1, 32), (7, 192), (300, 256), (3, 5), (10, 100), (129, 130), (64, 1), (1, 1)]


def encode(format: str, **tensors: torch.Tensor) -> tuple[torch.Tensor, Layout, dict[str, torch.Tensor]]:
    codec = codec_for(format)
    layout = codec.layout([TensorSpec(name, tuple(tensor.shape)) for name, tensor in tensors.items()])
    buffer = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
    codec.encode(tensors, layout, buffer)
    return buffer, layout, views_of(buffer, layout, "w")


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def in_mxfp4_blocks(weights: torch.Tensor) -> torch.Tensor:
    """float64 [M, blocks, 32]"""
    return torch.nn.functional.pad(weights.double(), (0, -weights.shape[1] % 32)).view(len(weights), -1, 32)


def check_mxfp4(weights: torch.Tensor) -> None:
    buffer, layout, parts = encode("mxfp4", w=weights)
    decoded = codec_for("mxfp4").decode(buffer, layout, torch.float32)["w"]
    blocks, got = in_mxfp4_blocks(weights), in_mxfp4_blocks(decoded)
    scale = torch.exp2(parts["scale"].double() - 127).unsqueeze(-1)
    largest = blocks.abs().amax(-1, keepdim=True)
    # Written out: the exponent of the largest, less two, or one more; each weight at its nearest number.
    exponent = torch.frexp(largest)[1].double() - 3
    near, far = (torch.exp2(exponent.clamp(-127) + more) for more in (0, 1))
    assert ((scale == near) | (scale == far) | (largest == 0)).all()

    def nearest(scale: torch.Tensor) -> torch.Tensor:
        return (blocks.abs() / scale).unsqueeze(-1).sub(GRID).abs().amin(-1) * scale

    off = (got - blocks).abs()
    assert torch.equal(off, nearest(scale))
    squares, other = (each.square().sum(-1) for each in (off, nearest(near + far - scale)))
    assert (squares <= other * (1 + 1e-5)).all()
    assert (torch.signbit(got) == torch.signbit(blocks))[..., : weights.shape[1]].all()
    bounded = largest >= 2.0**-125
    assert (off <= torch.where(bounded, largest / 4, 2.0**-127)).all()
    assert (off <= torch.maximum(blocks.abs() / 4, scale / 4)).all()


def check_fp8(weights: torch.Tensor) -> None:
    buffer, layout, parts = encode("fp8", w=weights)
    decoded = codec_for("fp8").decode(buffer, layout, torch.float32)["w"].double()
    assert parts["q"].float().isfinite().all()
    assert parts["scale"].isfinite().all()
    rows, cols = weights.shape
    scale = parts["scale"].double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    # Three bits behind the first: half a step is a sixteenth; below 2^-6 steps are 2^-9.
    bound = torch.maximum(weights.double().abs() / 16, scale * 2.0**-10) * (1 + 2e-6)
    assert ((decoded - weights.double()).abs() <= bound).all()
    for i in range(0, rows, 128):
        for j in range(0, cols, 128):
            largest = float(weights[i : i + 128, j : j + 128].abs().max())
            assert float(parts["scale"][i // 128, j // 128]) == pytest.approx(max(largest / 448, 2.0**-126))


CHECKS: dict[str, Any] = {"mxfp4": check_mxfp4, "fp8": check_fp8}


@pytest.mark.parametrize("format", CHECKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_weight_at_its_nearest_number(format: str, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        CHECKS[format]((0.02 * normal(*shape)).to(dtype).float())


@pytest.mark.parametrize("format", CHECKS)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    columns=st.integers(1, 140),
    magnitudes=st.lists(st.integers(-140, 120), min_size=1, max_size=4),
)
def test_weights_of_any_magnitude(
    format: str, seed: int, rows: int, columns: int, magnitudes: list[int]
) -> None:
    """From float32's subnormal numbers to its largest, all in one block or each in its own."""
    generator = torch.Generator().manual_seed(seed)
    weights = 2 * torch.rand(rows, columns, generator=generator) - 1
    choice = torch.randint(len(magnitudes), (rows, columns), generator=generator)
    CHECKS[format](torch.ldexp(weights, torch.tensor(magnitudes)[choice].float()))


def test_ties_go_to_even_mantissas() -> None:
    weights = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]])
    buffer, layout, _ = encode("mxfp4", w=torch.cat([weights, -weights], dim=1))
    wanted = torch.tensor([[0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]])
    got = codec_for("mxfp4").decode(buffer, layout, torch.float32)["w"]
    assert torch.equal(got, torch.cat([wanted, -wanted], dim=1))


def test_what_is_stored_is_kept_to_the_byte() -> None:
    """Weights that came from the format go back to it without loss."""
    for format in CHECKS:
        buffer, layout, _ = encode(format, w=normal(130, 160))
        decoded = codec_for(format).decode(buffer, layout, torch.float32)["w"]
        again, _, _ = encode(format, w=decoded)
        assert torch.equal(codec_for(format).decode(again, layout, torch.float32)["w"], decoded)


@pytest.mark.parametrize("format", CHECKS)
def test_the_layout_is_that_of_what_is_published(format: str) -> None:
    specs = [TensorSpec("gate_up_proj", (512, 256)), TensorSpec("down_proj", (256, 256))]
    stored = StoredFormat(format, "bfloat16", (128, 128) if format == "fp8" else None).layout(specs)
    assert codec_for(format).layout(specs) == stored
    assert decoder_for(format).decode is not None
    bits = {"mxfp4": 4.25, "fp8": 8 + 32 / 128**2}[format]
    assert 8 * sum(part.nbytes for part in stored.segments) == bits * sum(spec.numel for spec in specs)


@pytest.mark.parametrize("format", CHECKS)
def test_biases_and_padding(format: str) -> None:
    bias = normal(1, 5)[0]
    buffer, layout, _ = encode(format, w=normal(5, 130), w_bias=bias)
    assert torch.equal(codec_for(format).decode(buffer, layout, torch.float32)["w_bias"], bias)
    used = torch.zeros(layout.nbytes, dtype=torch.bool)
    for part in layout.segments:
        used[part.offset : part.offset + part.nbytes] = True
    assert not buffer[~used].any()


@pytest.mark.parametrize("format", CHECKS)
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_change_no_byte(
    monkeypatch: pytest.MonkeyPatch, format: str, threads: int
) -> None:
    weights = normal(300, 100)
    whole, _, _ = encode(format, w=weights)
    monkeypatch.setattr(parallel, "CHUNK", 256)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        chunked, _, _ = encode(format, w=weights.requires_grad_())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, chunked)


@pytest.mark.parametrize("format", CHECKS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_refused(format: str, bad: float) -> None:
    weights = normal(3, 70)
    weights[1, 66] = bad
    with pytest.raises(CheckpointError, match=r"w has 1 of 210 weights that are (NaN|infinite)"):
        encode(format, w=weights)


def test_what_mxfp4_cannot_reach_is_refused() -> None:
    weights = normal(3, 70)
    weights[2, 2] = 3.1e38
    with pytest.raises(CheckpointError, match=r"w has weights up to 3.1e\+38, above the largest mxfp4 takes"):
        encode("mxfp4", w=weights)


ERRORS = {"int8": (0.0060, 0.0082, 0.0112), "mxfp4": (0.112, 0.123, 0.138), "fp8": (0.0266, 0.0266, 0.0265)}
"""As docs/formats.md has them: of normal weights, and Student's t with 5 and 3 degrees of freedom."""


@pytest.mark.parametrize("format", ERRORS)
def test_errors_are_those_of_the_docs(format: str) -> None:
    torch.manual_seed(0)
    kinds = [torch.randn(256, 1024)]
    kinds += [torch.distributions.StudentT(float(df)).sample((256, 1024)) for df in (5, 3)]
    for weights, limit in zip(kinds, ERRORS[format], strict=True):
        buffer, layout, _ = encode(format, w=weights)
        off = codec_for(format).decode(buffer, layout, torch.float32)["w"] - weights
        assert 0.9 * limit < float(off.norm() / weights.norm()) < 1.02 * limit
