"""The linear layers of the dense part, against torch's own on the same, or on the decoded, weight."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from moe_local.cache.errors import CheckpointError
from moe_local.offload.dense import linear
from moe_local.offload.dense.linear import NativeLinear, QuantizedLinear, use_native_linears
from moe_local.offload.kernels import cpu
from moe_local.offload.kernels.cpu import multiply
from moe_local.offload.quantize.codec import codec_for

torch.set_num_threads(1)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-6}


def make(
    format: str = "nf4", columns: int = 128, rows: int = 96, bias: bool = True, activations: str = "native"
) -> tuple[QuantizedLinear, nn.Linear]:
    """A quantized layer and torch's with the same numbers, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(columns + rows)
        original = nn.Linear(columns, rows, bias=bias)
    layer = QuantizedLinear(original, format, activations)
    layer.weight = layer.quantized("weight", original.weight)
    if original.bias is not None:
        layer.bias = layer.quantized("bias", original.bias)
    plain = copy.deepcopy(original).double().requires_grad_(False)
    plain.weight.copy_(codec_for(format).decode(layer.weight, layer.layout, torch.float32)["weight"])
    assert 0 < (plain.weight - original.weight).norm() < 0.12 * original.weight.norm()
    return layer, plain


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def check_equal(layer: nn.Module, plain: nn.Linear, x: torch.Tensor, tolerance: float | None = None) -> None:
    got, want = layer(x), plain(x.double())
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    tolerance = TOLERANCE[x.dtype] if tolerance is None else tolerance
    # Few sums may happen to cancel, so what counts is how large random ones are.
    usual = torch.outer(x.double().flatten(0, -2).norm(dim=-1), plain.weight.norm(dim=1)) / x.shape[-1] ** 0.5
    assert (got.double() - want).norm() <= tolerance * (usual.norm() + want.norm())


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(128, 96), (64, 1), (320, 130), (100, 7), (1, 3)])
def test_multiplies_with_the_decoded_weight(format: str, bias: bool, sizes: tuple[int, int]) -> None:
    layer, plain = make(format, *sizes, bias)
    columns = sizes[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(inputs(columns).to(dtype)).shape == (sizes[1],)
        for shape in ((1, columns), (1, 1, columns), (2, 3, 5, columns), (300, columns)):
            check_equal(layer, plain, inputs(*shape).to(dtype))


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (0, 4, 128)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    layer, _ = make()
    assert layer(torch.empty(shape, dtype=torch.bfloat16)).shape == (*shape[:-1], 96)


def test_inputs_that_are_not_contiguous() -> None:
    layer, plain = make()
    check_equal(layer, plain, inputs(128, 7).T)
    check_equal(layer, plain, inputs(3, 256)[:, ::2])
    check_equal(layer, plain, inputs(4, 2, 128).transpose(0, 1))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_without_the_library(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    layer, plain = make(format)
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(cpu, "multiply", None)
    for dtype in TOLERANCE:
        # bf16 and fp16 round the weight, too
        check_equal(layer, plain, inputs(5, 128).to(dtype), 2 * TOLERANCE[dtype])


def test_other_dtypes_and_autocast() -> None:
    layer, plain = make()
    check_equal(layer, plain, inputs(5, 128).double())
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(inputs(5, 128))
    assert got.dtype == torch.bfloat16
    assert (got - plain(inputs(5, 128).double())).norm() < 0.02 * got.norm()


def test_gradients_reach_the_input() -> None:
    layer, plain = make()
    x, again = inputs(5, 128).requires_grad_(), inputs(5, 128).double().requires_grad_()
    layer(x).square().sum().backward()
    plain(again).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), again.grad, rtol=1e-4, atol=1e-4)
    assert not layer(x.detach()).requires_grad


@pytest.mark.skipif(cpu.library() is None, reason="the reference path rounds no activations")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_rounded_activations_are_close_and_only_taken_when_asked_for(format: str) -> None:
    layer, plain = make(format)
    rounded, _ = make(format, activations="int8")
    x = inputs(3, 128)
    check_equal(rounded, plain, x, 0.015)
    error = [float((module(x) - plain(x.double())).norm()) for module in (layer, rounded)]
    assert error[1] > 100 * error[0]


def test_copies_read_their_own_bytes() -> None:
    layer, plain = make()
    x = inputs(2, 128)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
        other.weight.zero_()
        other.bias.zero_()
        assert not torch.equal(other(x), want)
        assert torch.equal(layer(x), want)
    changed, _ = make(columns=128, rows=96, bias=True)
    changed(x)
    changed.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    changed.load_state_dict(layer.state_dict())
    assert torch.equal(changed(x), want)
    check_equal(changed, plain, x)


def test_bytes_of_an_expert_and_a_float32_bias() -> None:
    layer, _ = make("int8", 128, 96)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() == layer.layout.nbytes == 16384
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert repr(layer) == "QuantizedLinear(in_features=128, out_features=96, bias=True, format=int8)"


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_bad_numbers_are_refused(name: str) -> None:
    layer = QuantizedLinear(nn.Linear(64, 32), "nf4")
    values = torch.ones(32, 64) if name == "weight" else torch.ones(32)
    values.view(-1)[5] = torch.nan
    with pytest.raises(CheckpointError, match=f"{name} has 1 of .* NaN"):
        layer.quantized(name, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_layer_takes_few_tokens_to_the_library(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all else to torch, with the same results but for the order of a sum."""
    calls: list[tuple[int, ...]] = []

    def noted(matrix: Any, x: torch.Tensor, activations: int) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return multiply(matrix, x, activations)

    monkeypatch.setattr(linear, "multiply", noted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 70), nn.Linear(70, 30, bias=False)).to(dtype)
    plain = copy.deepcopy(model)
    use_native_linears(model)
    assert all(isinstance(layer, NativeLinear) for layer in model)
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for shape, taken in (((100,), 2), ((1, 1, 100), 2), ((4, 100), 2), ((5, 100), 0), ((0, 100), 0)):
            x = torch.randn(shape).to(dtype)
            calls.clear()
            got, want = model(x), plain(x)
            assert got.shape == want.shape
            assert got.dtype is dtype
            assert torch.allclose(got.float(), want.float(), atol=4 * torch.finfo(dtype).eps)
            assert len(calls) == taken
        calls.clear()
        double = copy.deepcopy(model).double()
        assert double(torch.randn(1, 100).double()).dtype is torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(1, 100).to(dtype))
    assert model(torch.randn(1, 100).to(dtype)).requires_grad
    assert calls == []
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(torch.randn(1, 99).to(dtype))
