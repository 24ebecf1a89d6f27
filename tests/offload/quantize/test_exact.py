"""The formats that keep weights as they are."""

from __future__ import annotations

import pytest
import torch

from moe_local.cache.errors import CheckpointError, OptionError
from moe_local.offload.quantize.codec import codec_for, codecs
from moe_local.offload.quantize.exact import ExactCodec
from moe_local.offload.quantize.layout import TensorSpec

SPECS = [TensorSpec("gate_up_proj", (6, 10)), TensorSpec("bias", (7,)), TensorSpec("down_proj", (10, 3))]


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator).to(dtype) for spec in SPECS}


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_round_trip_is_bit_equal_and_a_view(name):
    codec = ExactCodec(name)
    layout = codec.layout(SPECS)
    tensors = weights(codec.dtype)
    buffer = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
    codec.encode(tensors, layout, buffer)
    decoded = codec.decode(buffer, layout, codec.dtype)
    assert list(decoded) == [spec.name for spec in SPECS]
    for spec in SPECS:
        assert torch.equal(decoded[spec.name], tensors[spec.name])
        assert decoded[spec.name].untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    used = sum(segment.nbytes for segment in layout.segments)
    assert int(buffer.count_nonzero()) <= used  # padding is zero, not 0xAA
    other = codec.decode(buffer, layout, torch.float64)
    assert torch.equal(other["bias"], tensors["bias"].double())
    assert other["bias"].untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()


def test_rounding_is_that_of_torch():
    codec = ExactCodec("bf16")
    layout = codec.layout(SPECS)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    tensors = weights(torch.float32)
    codec.encode(tensors, layout, buffer)
    for name, tensor in codec.decode(buffer, layout, torch.bfloat16).items():
        assert torch.equal(tensor, tensors[name].bfloat16())


@pytest.mark.parametrize(
    ("name", "dtype", "value"),
    [("fp16", torch.float32, 65520.0), ("fp16", torch.bfloat16, -1e5), ("bf16", torch.float32, 3.4e38)],
)
def test_overflow_is_an_error_not_infinity(name, dtype, value):
    codec = ExactCodec(name)
    layout = codec.layout(SPECS)
    tensors = weights(dtype)
    tensors["down_proj"][9, 2] = value
    with pytest.raises(
        CheckpointError, match=f"^down_proj has values up to .* above the largest {name} number"
    ):
        codec.encode(tensors, layout, torch.empty(layout.nbytes, dtype=torch.uint8))


def test_the_largest_number_is_allowed():
    codec = ExactCodec("fp16")
    layout = codec.layout(SPECS)
    tensors = weights(torch.float32)
    tensors["bias"][0] = 65504.0
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    codec.encode(tensors, layout, buffer)
    assert codec.decode(buffer, layout, torch.float16)["bias"][0] == 65504.0


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_bad_weights_are_refused(name, value, word):
    codec = ExactCodec(name)
    layout = codec.layout(SPECS)
    tensors = weights(torch.float32)
    tensors["gate_up_proj"][0, 0] = value
    with pytest.raises(CheckpointError, match=f"^gate_up_proj has 1 of 60 weights that are {word}"):
        codec.encode(tensors, layout, torch.empty(layout.nbytes, dtype=torch.uint8))


def test_codecs_by_name():
    assert list(codecs()) == ["nf4", "int8", "q3", "q2", "mxfp4", "fp8", "bf16", "fp16", "fp32"]
    for name, codec in codecs().items():
        assert codec.name == codec_for(name).name == codec.layout(SPECS).format == name
    assert [codec.exact for codec in codecs().values()] == [False] * 6 + [True] * 3
    with pytest.raises(
        OptionError,
        match="unknown expert format 'int3'; use one of nf4, int8, q3, q2, mxfp4, fp8, bf16, fp16",
    ):
        codec_for("int3")
    with pytest.raises(OptionError, match="'nf4'; use one of fp32, bf16, fp16"):
        ExactCodec("nf4")
