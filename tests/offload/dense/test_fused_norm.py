"""Norms that torch computes in one operation: which are taken, and what is left to the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from moe_local.offload.dense.fused_norm import use_fused_norms
from tests.offload.dense.test_norm import OTHER, SAME, SHIFTED, filled, numbers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def taken(norm: Any) -> bool:
    model = nn.ModuleList([norm])
    use_fused_norms(model)
    return "_norm_kind" in vars(model[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [*SAME, *OTHER])
def test_only_what_computes_the_same_is_taken(cls: Any, dtype: torch.dtype) -> None:
    for width in (16, 4096):
        assert taken(filled(cls(width, 1e-5)).to(dtype)) == (cls in SAME), width


def test_what_is_no_such_norm_is_not_taken() -> None:
    norm = filled(MixtralRMSNorm(64, 1e-5))
    assert not taken(nn.LayerNorm(64))
    assert not taken(copy.deepcopy(norm).double())
    hooked = copy.deepcopy(norm)
    hooked.forward = lambda x: x  # as accelerate does, to move tensors from card to card
    assert not taken(hooked)
    assert taken(norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [MixtralRMSNorm, *SHIFTED])
def test_answers_as_the_original_for_any_number_of_tokens(cls: Any, dtype: torch.dtype) -> None:
    plain = filled(cls(64, 1e-5)).to(dtype)
    norm = copy.deepcopy(plain)
    assert taken(norm)
    assert isinstance(norm, cls)
    with torch.no_grad():
        for x in (
            numbers(1, 1, 64),
            numbers(2, 300, 64),
            numbers(1, 4, 5, 64).transpose(1, 2),
            numbers(64, 3).T,
        ):
            got, want = norm(x.to(dtype)), plain(x.to(dtype))
            assert got.dtype is dtype
            assert torch.allclose(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", SHIFTED)
def test_what_is_added_to_one_is_rounded_once_as_by_the_original(cls: Any, dtype: torch.dtype) -> None:
    """All bits, where a sum is fused with its product as in torch's kernels for AVX2 and CUDA; where it is
    not, one in thousands is a step off. Rounded twice, one in four is."""
    for width in (64, 2048):
        plain = filled(cls(width, 1e-5)).to(dtype)
        norm = copy.deepcopy(plain)
        assert taken(norm)
        with torch.no_grad():
            x = 3 * numbers(300, width)
            got, want = norm(x.to(dtype)), plain(x.to(dtype))
        assert (got != want).float().mean() < 1e-3


def test_all_else_is_left_to_the_original() -> None:
    plain = filled(MixtralRMSNorm(64, 1e-5))
    norm = copy.deepcopy(plain)
    assert taken(norm)
    with torch.no_grad():
        assert torch.equal(norm(numbers(1, 64).bfloat16()), plain(numbers(1, 64).bfloat16()))
        assert torch.equal(norm(numbers(2, 1)), plain(numbers(2, 1)))  # torch stretches it
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm(numbers(1, 64)), plain(numbers(1, 64)))
    x, again = numbers(1, 64).requires_grad_(), numbers(1, 64).requires_grad_()
    norm(x).sum().backward()
    plain(again).sum().backward()
    assert torch.equal(x.grad, again.grad)  # type: ignore[arg-type]


class Operations(TorchDispatchMode):
    """Names of torch's operations that are done, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


SHIFTED_OPERATIONS = ["aten::to", "aten::rms_norm", "aten::empty_like", "aten::addcmul"]


@pytest.mark.parametrize(
    ("cls", "names"),
    [(MixtralRMSNorm, ["aten::rms_norm"]), *((cls, SHIFTED_OPERATIONS) for cls in SHIFTED)],
)
def test_it_is_few_operations(cls: Any, names: list[str]) -> None:
    plain = filled(cls(64, 1e-5)).bfloat16()
    norm, x = copy.deepcopy(plain), numbers(1, 1, 64).bfloat16()
    assert taken(norm)
    with torch.inference_mode(), Operations() as fused:  # in which torch's are not taken apart
        norm(x)
    with torch.inference_mode(), Operations() as own:
        plain(x)
    assert fused.names == names
    assert len(own.names) >= 8
