"""NF4 against bitsandbytes itself, and against its definition written out."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from moe_local.cache.errors import CheckpointError
from moe_local.offload.quantize.bnb import bitsandbytes_ops
from moe_local.offload.quantize.code_tables import dynamic_map, nf4_levels
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.nf4 import NF4Codec, nf4_matrix

bitsandbytes_ops()
from bitsandbytes import functional  # noqa: E402

WHOLE_ROWS = [(1, 64), (2, 64), (7, 192), (96, 256), (300, 128)]
ODD_ROWS = [(3, 5), (7, 6), (10, 100), (33, 48), (64, 96), (5, 130), (31, 33), (64, 1), (1, 1)]


pytestmark = pytest.mark.usefixtures("one_thread")


def random_weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def encode(**tensors: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    codec = NF4Codec()
    layout = codec.layout([TensorSpec(name, tuple(tensor.shape)) for name, tensor in tensors.items()])
    buffer = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
    codec.encode(tensors, layout, buffer)
    return buffer, layout


def by_definition(buffer: torch.Tensor, layout: Layout, name: str) -> torch.Tensor:
    """float32 weights from the stored parts, by the formula in NF4Matrix' docstring."""
    matrix = nf4_matrix(buffer, layout, name)
    numel = TensorSpec(name, matrix.shape).numel
    nibbles = torch.stack([matrix.q >> 4, matrix.q & 15], 1).view(-1)[:numel].long()
    nested = matrix.absmax_scale.repeat_interleave(256)[: matrix.absmax.numel()]
    scales = dynamic_map(torch.device("cpu"))[matrix.absmax.long()] * nested + matrix.offset
    levels = functional.get_4bit_type("nf4", device="cpu")
    return (levels[nibbles] * scales.repeat_interleave(64)[:numel]).view(matrix.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", WHOLE_ROWS + ODD_ROWS)
def test_bytes_are_those_of_bitsandbytes(shape, dtype):
    weights = random_weights(shape, dtype)
    buffer, layout = encode(w=weights)
    q, state = functional.quantize_4bit(weights, quant_type="nf4", blocksize=64, compress_statistics=True)
    matrix = nf4_matrix(buffer, layout, "w")
    assert torch.equal(matrix.q, q.view(-1))
    assert torch.equal(matrix.absmax, state.absmax)
    assert torch.equal(matrix.absmax_scale, state.state2.absmax)
    assert torch.equal(matrix.offset, state.offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", WHOLE_ROWS)
def test_decode_is_bit_equal_to_bitsandbytes(shape, dtype):
    weights = random_weights(shape, dtype)
    buffer, layout = encode(w=weights)
    q, state = functional.quantize_4bit(weights, quant_type="nf4", blocksize=64, compress_statistics=True)
    decoded = NF4Codec().decode(buffer, layout, dtype)["w"]
    # bitsandbytes returns the transpose when the packed tensor itself has one row
    assert torch.equal(decoded, functional.dequantize_4bit(q, state).view(shape))
    assert decoded.dtype == dtype


@pytest.mark.parametrize("shape", WHOLE_ROWS + ODD_ROWS)
def test_decode_follows_the_definition(shape):
    """bitsandbytes' own call is wrong on AVX512 CPUs for some of ODD_ROWS, so the formula is the judge."""
    buffer, layout = encode(w=random_weights(shape))
    expected = by_definition(buffer, layout, "w")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(NF4Codec().decode(buffer, layout, dtype)["w"], expected.to(dtype))


def test_an_expert_with_biases():
    tensors = {
        "gate_up_proj": random_weights((96, 64), torch.bfloat16),
        "gate_up_proj_bias": random_weights((96,), torch.bfloat16),
        "down_proj": random_weights((64, 48), torch.bfloat16),
        "down_proj_bias": random_weights((64,), torch.bfloat16),
    }
    buffer, layout = encode(**tensors)
    decoded = NF4Codec().decode(buffer, layout, torch.bfloat16)
    assert list(decoded) == list(tensors)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        assert torch.equal(decoded[name], tensors[name])
    for name in ("gate_up_proj", "down_proj"):
        error = (decoded[name].float() - tensors[name].float()).norm() / tensors[name].float().norm()
        assert 0.05 < error < 0.12


def test_same_weights_same_bytes_whatever_the_buffer_held():
    weights = random_weights((10, 100))
    codec = NF4Codec()
    layout = codec.layout([TensorSpec("w", (10, 100))])
    buffers = [torch.full((layout.nbytes,), fill, dtype=torch.uint8) for fill in (0, 0xFF)]
    for buffer in buffers:
        codec.encode({"w": weights}, layout, buffer)
    assert torch.equal(*buffers)


def test_decode_reads_a_slot_larger_than_the_expert():
    buffer, layout = encode(w=random_weights((96, 64)))
    slot = torch.cat([buffer, torch.full((512,), 7, dtype=torch.uint8)])
    assert torch.equal(
        NF4Codec().decode(slot, layout, torch.float32)["w"],
        NF4Codec().decode(buffer, layout, torch.float32)["w"],
    )


def test_parts_are_views_of_the_buffer():
    buffer, layout = encode(w=random_weights((96, 64)))
    matrix = nf4_matrix(buffer, layout, "w")
    for part in (matrix.q, matrix.absmax, matrix.absmax_scale, matrix.offset):
        assert part.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert part.storage_offset() * part.element_size() % 256 == 0


def test_size_of_an_expert_of_mixtral():
    layout = NF4Codec().layout(
        [TensorSpec("gate_up_proj", (28672, 4096)), TensorSpec("down_proj", (4096, 14336))]
    )
    bits = layout.nbytes * 8 / (3 * 14336 * 4096)
    assert 4.125 < bits < 4.13


def test_zeros_stay_zeros():
    buffer, layout = encode(w=torch.zeros(8, 64))
    assert not NF4Codec().decode(buffer, layout, torch.float32)["w"].any()


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (float("-inf"), "infinite")]
)
@pytest.mark.parametrize("name", ["w", "bias"])
def test_bad_weights_are_refused(name, value, word):
    tensors = {"w": random_weights((10, 100)), "bias": random_weights((10,))}
    tensors[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"^{name} has 1 of .* {word}"):
        encode(**tensors)


def test_weights_beyond_float32_are_refused():
    with pytest.raises(CheckpointError, match=r"w has weights up to inf, too large for NF4"):
        encode(w=torch.full((2, 64), 1e300, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", WHOLE_ROWS + ODD_ROWS)
def test_decode_on_cuda(shape, dtype):
    buffer, layout = encode(w=random_weights(shape))
    decoded = NF4Codec().decode(buffer.cuda(), layout, dtype)["w"]
    assert decoded.is_cuda
    assert torch.equal(decoded.cpu(), by_definition(buffer, layout, "w").to(dtype))


def test_tables_are_those_of_bitsandbytes() -> None:
    bitsandbytes_ops()
    functional = import_module("bitsandbytes.functional")
    cpu = torch.device("cpu")
    assert torch.equal(dynamic_map(cpu), functional.create_dynamic_map())
    assert torch.equal(nf4_levels(cpu), functional.get_4bit_type("nf4", device="cpu"))
