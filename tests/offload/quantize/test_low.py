"""Three and two bits against their definition written out, and the searched scales against trying all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.cache.errors import CheckpointError
from moe_local.offload.kernels.cpu import cpu_linear
from moe_local.offload.native.library import ISAS, check, library, loaded_library
from moe_local.offload.quantize import low, low_blocks
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import Layout, TensorSpec
from moe_local.offload.quantize.low import low_matrix

SHAPES = [(1, 64), (7, 192), (3, 5), (10, 100), (5, 130), (64, 1), (33, 65)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Of q3 and q2: columns of a block; levels; the outermost zeros' distance from a level; zeros from 0 to 15.
DEFINED: dict[str, tuple[int, list[int], list[float]]] = {
    "q3": (32, [0, 3, 5, 7, 9, 11, 13, 16], [2.375 + 0.75 * z for z in range(16)]),
    "q2": (16, [0, 1, 2, 3], [(26 * z - 3) / 128 for z in range(16)]),
}
STEPS = [mantissa * 2**octave / 256 for octave in range(6) for mantissa in (8, 10, 13)][:16]

GAUSSIAN = {"q3": (0.149, 0.152), "q2": (0.264, 0.268)}
"""Relative error of normal weights in the Frobenius norm; docs/formats.md."""


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    lib = library()
    threads, isa = torch.get_num_threads(), 0 if lib is None else lib.moe_isa()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if lib is not None:
        check(lib.moe_set_isa(isa))


@pytest.fixture(params=["q3", "q2"])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random_weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def encode(format: str, **tensors: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    codec = codec_for(format)
    layout = codec.layout([TensorSpec(name, tuple(tensor.shape)) for name, tensor in tensors.items()])
    buffer = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
    codec.encode(tensors, layout, buffer)
    return buffer, layout


def encoders() -> list[str]:
    """All that have to give the same bytes."""
    lib = library()
    return ["torch", *(() if lib is None else ISAS[: lib.moe_best_isa() + 1])]


def encode_by(name: str, format: str, weights: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    if name == "torch":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(low_blocks, "library", lambda: None)
            return encode(format, w=weights)
    check(loaded_library().moe_set_isa(ISAS.index(name)))
    return encode(format, w=weights)


def written_out(format: str, buffer: torch.Tensor, layout: Layout) -> list[list[float]]:
    """The weights by the words of the docs, number by number."""
    block, levels, zeros = DEFINED[format]
    q, scale, row_scale = low_matrix(buffer, layout, "w")
    rows, cols = layout.tensors[0].shape
    found = []
    for row in range(rows):
        words = [[int(n) for n in plane.view(torch.int32)] for plane in q[row]]
        found.append([])
        for column in range(cols):
            b, k = divmod(column, block)
            code = words[k // 16][b] >> (2 * (k % 16)) & 3
            if format == "q3":
                code |= (words[2][b] >> (8 * (k % 16 // 4) + 4 * (k // 16) + k % 4) & 1) << 2
            byte = int(scale[row, b])
            exact = STEPS[byte & 15] * (levels[code] - zeros[byte >> 4])
            found[-1].append(exact * float(row_scale[row]))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_is_the_definition(format: str, shape: tuple[int, int]) -> None:
    buffer, layout = encode(format, w=random_weights(shape))
    wanted = torch.tensor(written_out(format, buffer, layout), dtype=torch.float64)
    for dtype in DTYPES:
        decoded = codec_for(format).decode(buffer, layout, dtype)["w"]
        assert torch.equal(decoded, wanted.float().to(dtype))


def test_random_bytes_decode_as_the_definition_says(format: str) -> None:
    _, layout = encode(format, w=random_weights((5, 130)))
    buffer = torch.randint(256, (layout.nbytes,), generator=torch.Generator().manual_seed(0)).byte()
    low_matrix(buffer, layout, "w").row_scale.copy_(torch.tensor([1.0, 0.0, 2.0**-40, 3.0, 1e30]))
    wanted = torch.tensor(written_out(format, buffer, layout), dtype=torch.float64).float()
    assert torch.equal(codec_for(format).decode(buffer, layout, torch.float32)["w"], wanted)


def check_bound(format: str, weights: torch.Tensor) -> None:
    """The proven bound: a block is off by no more than with the first step that reaches its range.

    There the zero is off by half of what separates two of them, and a weight by half of what separates two
    levels, for each of the block's weights; and the step is the next of STEPS, or the least one there is.
    """
    buffer, layout = encode(format, w=weights)
    block, levels, zeros = DEFINED[format]
    decoded = codec_for(format).decode(buffer, layout, torch.float32)["w"].double()
    off = torch.nn.functional.pad((decoded - weights.double()).square(), (0, -weights.shape[1] % block))
    padded = torch.nn.functional.pad(weights.double(), (0, -weights.shape[1] % block))
    blocks = padded.view(len(weights), -1, block)
    high, low = blocks.amax(2).clamp(min=0), blocks.amin(2).clamp(max=0)
    top = levels[-1]
    ranges = torch.maximum((high - low) / top, torch.maximum(high, -low) / (top - zeros[0]))
    row_scale = ranges.amax(1, keepdim=True)
    step = torch.minimum(torch.maximum(1.31 * ranges, row_scale * STEPS[0]), row_scale)
    gap = max(upper - lower for lower, upper in pairwise(levels))
    each = step * (gap + zeros[1] - zeros[0]) / 2 * 1.0001
    least = 1e-37 * max(top, top - zeros[0])  # rows whose scale is below 1e-37 are zeros
    bound = block**0.5 * each + block**0.5 * least
    assert (off.view(len(weights), -1, block).sum(2).sqrt() <= bound).all()


@settings(deadline=None, max_examples=100)
@given(
    format=st.sampled_from(["q3", "q2"]),
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    columns=st.integers(1, 140),
    magnitudes=st.lists(st.integers(-140, 120), min_size=1, max_size=4),
    shift=st.sampled_from([0.0, 0.5, -3.0]),
)
def test_error_bound(
    format: str, seed: int, rows: int, columns: int, magnitudes: list[int], shift: float
) -> None:
    """Of any magnitude and mix of magnitudes, around zero or beside it."""
    generator = torch.Generator().manual_seed(seed)
    weights = 2 * torch.rand(rows, columns, generator=generator) - 1 + shift
    choice = torch.randint(len(magnitudes), (rows, columns), generator=generator)
    check_bound(format, torch.ldexp(weights, torch.tensor(magnitudes)[choice].float()))


@pytest.mark.parametrize("name", ["normal", "outliers", "constant", "one sign", "zeros"])
def test_everybody_encodes_the_same_bytes(format: str, name: str) -> None:
    weights = random_weights((6, 150))
    if name == "outliers":
        weights[::2, ::37] *= 40
    elif name == "constant":
        weights = torch.full_like(weights, -0.3)
    elif name == "one sign":
        weights = weights.abs() + 0.01
    elif name == "zeros":
        weights[1:4] = 0
        weights[4] = 1e-39
    check_bound(format, weights)
    for dtype in DTYPES:
        wanted, _ = encode_by("torch", format, weights.to(dtype))
        for other in encoders()[1:]:
            assert torch.equal(encode_by(other, format, weights.to(dtype))[0], wanted), other


def test_no_scale_near_the_range_errs_less(format: str) -> None:
    """The chosen byte against all zeros with the five steps that the docs name."""
    block, levels, zeros = DEFINED[format]
    weights = random_weights((4, block))
    buffer, layout = encode(format, w=weights)
    row_scale = low_matrix(buffer, layout, "w").row_scale.double()
    decoded = codec_for(format).decode(buffer, layout, torch.float32)["w"].double()
    for row, x in enumerate(weights.double()):
        found = float((decoded[row] - x).square().sum())
        for step in STEPS[-5:]:
            for zero in zeros:
                values = row_scale[row] * step * (torch.tensor(levels).double() - zero)
                best = (x.unsqueeze(1) - values).square().amin(1).sum()
                assert found <= float(best) * 1.00001


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_change_no_byte(
    format: str, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    weights = random_weights((411, 100))
    whole, layout = encode(format, w=weights)
    decoded = codec_for(format).decode(whole, layout, torch.float32)["w"]
    torch.set_num_threads(threads)
    assert torch.equal(encode(format, w=weights.T.contiguous().T.requires_grad_())[0], whole)
    for module in (low_blocks, low):
        monkeypatch.setattr(module, "LOW_CHUNK", 4000)
    assert torch.equal(encode_by("torch", format, weights)[0], whole)
    with torch.inference_mode():
        assert torch.equal(codec_for(format).decode(whole, layout, torch.float32)["w"], decoded)


@pytest.mark.parametrize(("format", "bits"), [("q3", 3.2555), ("q2", 2.5055)])
def test_size_of_an_expert_of_mixtral(format: str, bits: float) -> None:
    layout = codec_for(format).layout(
        [TensorSpec("gate_up_proj", (28672, 4096)), TensorSpec("down_proj", (4096, 14336))]
    )
    assert layout.nbytes * 8 / (3 * 14336 * 4096) == pytest.approx(bits, abs=1e-3)


def test_error_on_normal_weights(format: str) -> None:
    weights = random_weights((64, 2048))
    buffer, layout = encode(format, w=weights)
    decoded = codec_for(format).decode(buffer, layout, torch.float32)["w"]
    low, high = GAUSSIAN[format]
    assert low < float((decoded - weights).norm() / weights.norm()) < high


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (float("-inf"), "infinite")]
)
@pytest.mark.parametrize("name", ["w", "bias"])
def test_bad_weights_are_refused(format: str, name: str, value: float, word: str) -> None:
    tensors = {"w": random_weights((10, 100)), "bias": random_weights((10,))}
    tensors[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"^{name} has 1 of .* {word}"):
        encode(format, **tensors)


def test_weights_beyond_float32s_range_are_refused(format: str) -> None:
    weights = torch.zeros(2, 64)
    weights[1, 3], weights[1, 4] = 3e38, -3e38
    for name in encoders():
        with pytest.raises(CheckpointError, match=rf"^w has weights up to 3e\+38, too large for {format}"):
            encode_by(name, format, weights)


# --- the kernel; tests/native has every shape and number of tokens


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(96, 256), (31, 1088), (10, 100), (5, 1), (17, 1300)])
def test_the_kernel_multiplies_with_the_decoded_weights(
    format: str, isa: str, shape: tuple[int, int]
) -> None:
    lib = loaded_library()
    if lib is None or ISAS.index(isa) > lib.moe_best_isa():
        pytest.skip("not on this machine")
    check(lib.moe_set_isa(ISAS.index(isa)))
    buffer, layout = encode(format, w=random_weights(shape), w_bias=random_weights(shape[:1]))
    decoded = codec_for(format).decode(buffer, layout, torch.float32)
    matrix, bias = decoded["w"].double(), decoded["w_bias"].double()
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 2, 4, 7, 129):
        x = torch.randn(tokens, shape[1], generator=generator)
        for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
            wanted = x.to(dtype).double() @ matrix.T + bias
            got = cpu_linear(buffer, layout, True, "native")(x.to(dtype), "w")
            assert got.dtype == dtype
            assert (got.double() - wanted).norm() <= tolerance * wanted.norm()
        wanted = x.double() @ matrix.T
        rounded = cpu_linear(buffer, layout, False, "int8")(x, "w")
        assert (rounded.double() - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cuda(format: str, shape: tuple[int, int]) -> None:
    buffer, layout = encode(format, w=random_weights(shape))
    from_gpu = torch.empty_like(buffer)
    codec_for(format).encode({"w": random_weights(shape).cuda()}, layout, from_gpu)
    assert torch.equal(from_gpu, buffer)
    decoded = codec_for(format).decode(buffer.cuda(), layout, torch.bfloat16)["w"]
    assert decoded.is_cuda
    assert torch.equal(decoded.cpu(), codec_for(format).decode(buffer, layout, torch.bfloat16)["w"])
