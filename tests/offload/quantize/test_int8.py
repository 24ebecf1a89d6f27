"""Int8 against its definition written out, and the C++ kernel on its bytes against decoded weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_local.cache.errors import CheckpointError
from moe_local.offload.kernels.cpu import cpu_linear
from moe_local.offload.native.library import ISAS, check, loaded_library
from moe_local.offload.quantize import parallel
from moe_local.offload.quantize.int8 import Int8Codec, int8_matrix
from moe_local.offload.quantize.layout import Layout, TensorSpec

SHAPES = [(1, 64), (7, 192), (96, 256), (3, 5), (10, 100), (5, 130), (64, 1), (1, 1), (33, 65)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = torch.finfo(torch.float16)


pytestmark = pytest.mark.usefixtures("one_thread")


def random_weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def encode(**tensors: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    codec = Int8Codec()
    layout = codec.layout([TensorSpec(name, tuple(tensor.shape)) for name, tensor in tensors.items()])
    buffer = torch.full((layout.nbytes,), 0xAA, dtype=torch.uint8)
    codec.encode(tensors, layout, buffer)
    return buffer, layout


def scale_of_each(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """float64 [M, ceil(N / 64)] -> [M, N]."""
    return scale.double().repeat_interleave(64, 1)[:, :columns]


def check_weights(weights: torch.Tensor) -> None:
    """What is stored is the definition's, and decodes to within half a step of the weights."""
    buffer, layout = encode(w=weights)
    q, scale = int8_matrix(buffer, layout, "w")
    assert q.abs().max() <= 127
    assert scale.isfinite().all()
    assert scale.min() >= 0
    scales = scale_of_each(scale, weights.shape[1])
    stands_for = q.double() * scales
    assert ((stands_for - weights.double()).abs() <= scales * 0.50001).all()
    for dtype in DTYPES:
        assert torch.equal(Int8Codec().decode(buffer, layout, dtype)["w"], stands_for.float().to(dtype))
    for block in range(scale.shape[1]):
        largest = weights[:, 64 * block : 64 * block + 64].double().abs().amax(1)
        # One fp16 number more than the nearest at most.
        step = torch.maximum(largest / 127 * HALF.eps, torch.tensor(HALF.smallest_normal * HALF.eps))
        assert ((scale[:, block].double() - largest / 127).abs() <= step).all()
        assert ((scale[:, block] == 0) == (largest == 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_number_at_the_scale_of_its_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_weights(random_weights(shape, dtype))


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    columns=st.integers(1, 140),
    magnitudes=st.lists(st.integers(-140, 22), min_size=1, max_size=4),
)
def test_weights_of_any_magnitude(seed: int, rows: int, columns: int, magnitudes: list[int]) -> None:
    """From float32's subnormal numbers to what fp16 scales reach, all in one block or each in its own."""
    generator = torch.Generator().manual_seed(seed)
    weights = 2 * torch.rand(rows, columns, generator=generator) - 1
    choice = torch.randint(len(magnitudes), (rows, columns), generator=generator)
    check_weights(torch.ldexp(weights, torch.tensor(magnitudes)[choice].float()))


def test_every_fp16_number_as_the_largest_of_a_block() -> None:
    every = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    for factor in (1.0, 127.0, 127.5, 1 / 127.0, 3e-7):
        largest = every[every * factor <= 127 * HALF.max] * factor
        weights = largest.unsqueeze(1) * torch.tensor([[1.0, -1.0, 0.5, 1 / 254, 3 / 254, 0.0]])
        check_weights(weights)


def test_the_layout_is_that_of_the_header() -> None:
    weights = random_weights((5, 130))
    bias = random_weights((5,))
    buffer, layout = encode(w=weights, w_bias=bias)
    parts = {(s.name, s.part): (s.dtype, s.shape, s.offset) for s in layout.segments}
    assert parts == {
        ("w", "q"): ("int8", (5, 130), 0),
        ("w", "scale"): ("float16", (5, 3), 768),
        ("w_bias", "values"): ("float32", (5,), 1024),
    }
    assert torch.equal(buffer[1024:1044].view(torch.float32), bias)
    raw = buffer[768 : 768 + 30].view(torch.float16).view(5, 3)
    assert torch.equal(raw[4, 2], (weights[4, 128:].abs().max() / 127).half())
    used = {*range(650), *range(768, 798), *range(1024, 1044)}
    assert not buffer[[i for i in range(layout.nbytes) if i not in used]].any()


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_change_no_byte(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    weights = random_weights((37, 100))
    whole, _ = encode(w=weights)
    monkeypatch.setattr(parallel, "CHUNK", 256)
    torch.set_num_threads(threads)
    chunked, layout = encode(w=weights.requires_grad_())
    assert torch.equal(whole, chunked)
    decoded = Int8Codec().decode(chunked, layout, torch.float32)["w"]
    with torch.inference_mode():
        again, _ = encode(w=weights)
        assert torch.equal(again, whole)
        assert torch.equal(Int8Codec().decode(again, layout, torch.float32)["w"], decoded)
    monkeypatch.undo()
    assert torch.equal(Int8Codec().decode(whole, layout, torch.float32)["w"], decoded)
    assert torch.get_num_threads() == threads


def test_size_of_an_expert_of_mixtral() -> None:
    layout = Int8Codec().layout(
        [TensorSpec("gate_up_proj", (28672, 4096)), TensorSpec("down_proj", (4096, 14336))]
    )
    assert layout.nbytes * 8 == 8.25 * 3 * 14336 * 4096


def test_error_on_normal_weights() -> None:
    buffer, layout = encode(w=random_weights((256, 512)))
    decoded = Int8Codec().decode(buffer, layout, torch.float32)["w"]
    error = (decoded - random_weights((256, 512))).norm() / random_weights((256, 512)).norm()
    assert 0.004 < error < 0.007


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (float("-inf"), "infinite")]
)
@pytest.mark.parametrize("name", ["w", "bias"])
def test_bad_weights_are_refused(name: str, value: float, word: str) -> None:
    tensors = {"w": random_weights((10, 100)), "bias": random_weights((10,))}
    tensors[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"^{name} has 1 of .* {word}"):
        encode(**tensors)


@pytest.mark.parametrize("value", [1e7, -3e38, 1e300])
def test_weights_beyond_the_scales_are_refused(value: float) -> None:
    weights = torch.zeros(2, 64, dtype=torch.float64)
    weights[1, 3] = value
    with pytest.raises(CheckpointError, match=r"w has weights up to .* above the largest int8 takes") as info:
        encode(w=weights)
    assert "\n" not in str(info.value)


# --- the kernel


@pytest.fixture(params=ISAS)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set that this machine has."""
    lib = loaded_library()
    if lib is None or ISAS.index(request.param) > lib.moe_best_isa():
        pytest.skip("not on this machine")
    before = lib.moe_isa()
    check(lib.moe_set_isa(ISAS.index(request.param)))
    yield
    check(lib.moe_set_isa(before))


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("shape", [(64, 64), (96, 256), (31, 1088), (10, 100), (5, 1), (130, 65), (17, 1300)])
def test_the_kernel_multiplies_with_the_decoded_weights(shape: tuple[int, int]) -> None:
    weights = random_weights(shape)
    buffer, layout = encode(w=weights, w_bias=random_weights(shape[:1]))
    decoded = Int8Codec().decode(buffer, layout, torch.float32)
    matrix, bias = decoded["w"].double(), decoded["w_bias"].double()
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 2, 3, 7, 16, 17, 129, 200):
        x = torch.randn(tokens, shape[1], generator=generator)
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
            wanted = x.to(dtype).double() @ matrix.T + bias
            got = cpu_linear(buffer, layout, True, "native")(x.to(dtype), "w")
            assert got.dtype == dtype
            assert (got.double() - wanted).norm() <= tolerance * wanted.norm()
        wanted = x.double() @ matrix.T
        rounded = cpu_linear(buffer, layout, False, "int8")(x, "w")
        assert (rounded.double() - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cuda(shape: tuple[int, int], dtype: torch.dtype) -> None:
    buffer, layout = encode(w=random_weights(shape))
    from_gpu = torch.empty_like(buffer)
    Int8Codec().encode({"w": random_weights(shape).cuda()}, layout, from_gpu)
    assert torch.equal(from_gpu, buffer)
    decoded = Int8Codec().decode(buffer.cuda(), layout, dtype)["w"]
    assert decoded.is_cuda
    assert torch.equal(decoded.cpu(), Int8Codec().decode(buffer, layout, dtype)["w"])
