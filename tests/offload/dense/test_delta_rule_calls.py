"""The library's functions of linear attention: which arguments they take, and in which order of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from moe_local.offload.dense import delta_rule as module_under_test
from moe_local.offload.dense.delta_rule import convolve, convolve_sequences, delta_rule
from moe_local.offload.native.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("the library does this")


def passed(*args: Any, **options: Any) -> str:
    return "passed on"


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def ruled(tokens: int) -> dict[str, Any]:
    """Arguments for delta_rule, of two sequences."""
    return {
        "query": draw(2, tokens, 2, 8),
        "key": draw(2, tokens, 2, 8),
        "value": draw(2, tokens, 4, 16),
        "g": -draw(2, tokens, 4).abs(),
        "beta": draw(2, tokens, 4).sigmoid(),
        "initial_state": draw(2, 4, 8, 16),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }


def transformers_rule(given: dict[str, Any]) -> Any:
    """What transformers' function for single tokens gives, one token after the other."""
    wide = {name: given[name].repeat_interleave(2, dim=2) for name in ("query", "key")}
    with torch.no_grad():
        return qwen3_next.torch_recurrent_gated_delta_rule(**given | wide)


def repeated(x: torch.Tensor) -> torch.Tensor:
    """x [rows, tokens, ...], in which one token's numbers are all."""
    return x[:, :1].expand_as(x)


def among_others(x: torch.Tensor) -> torch.Tensor:
    """A slice of a wider array."""
    array = torch.full((*x.shape[:2], x[0, 0].numel() + 9), torch.nan, dtype=x.dtype)
    part = array[..., 4:-5]
    part.copy_(x.flatten(2))
    return part.unflatten(-1, x.shape[2:])


def without_the_first(x: torch.Tensor) -> torch.Tensor:
    """As of a convolution that begins with earlier inputs."""
    return torch.cat([torch.full_like(x[:, :1], torch.nan), x], dim=1)[:, 1:]


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """In memory [rows, heads, tokens, ...]; which also sets the stride of a single token."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def heads_last(x: torch.Tensor) -> torch.Tensor:
    """In memory [rows, tokens, width, heads], or [rows, heads, tokens]."""
    return x.mT.clone(memory_format=torch.contiguous_format).mT


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("change", [repeated, among_others, without_the_first, heads_first, heads_last])
@pytest.mark.parametrize(
    "which", [("query", "key", "value"), ("query",), ("key",), ("value",), ("beta", "g")]
)
def test_numbers_in_any_order_of_memory(
    change: Callable[[torch.Tensor], torch.Tensor], which: tuple[str, ...], tokens: int
) -> None:
    given = ruled(tokens)
    given |= {name: change(given[name]) for name in which}
    want, want_state = transformers_rule(given)
    got, state = delta_rule(never, **given)
    assert state is given["initial_state"]
    assert relative(got, want) <= 1e-5
    assert relative(state, want_state) <= 1e-5


def test_slices_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one convolution's outputs, whose tokens lie equally far apart."""
    given = ruled(5)
    given |= {name: among_others(given[name]) for name in ("query", "key", "value")}
    read: list[Any] = []

    class Noting:
        def moe_delta_rule(self, rule: Any, threads: int) -> int:
            read.append(rule._obj)
            return 0

    monkeypatch.setattr(module_under_test, "loaded_library", Noting)
    delta_rule(never, **given)
    assert [read[0].q, read[0].k, read[0].v] == [given[n].data_ptr() for n in ("query", "key", "value")]
    assert (read[0].key_stride, read[0].value_stride) == (2 * 8 + 9, 4 * 16 + 9)


def test_what_the_library_does_not_do_of_rules_is_transformers() -> None:
    for tokens in (1, 3):
        given = ruled(tokens)
        q, v, state = given["query"], given["value"], given["initial_state"]
        assert delta_rule(never, **given, use_cache=True, cu_seqlens=None)[1] is state
        others: list[dict[str, Any]] = [
            {"output_final_state": False},
            {"initial_state": None, "output_final_state": False},
            *({name: torch.tensor([0, 1])} for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx")),
            {"query": q.double(), "key": q.double()},
            {"g": given["g"].bfloat16()},
            {"initial_state": state.bfloat16()},
            {"initial_state": state.transpose(2, 3).contiguous().transpose(2, 3)},
            {"initial_state": state[:1]},
            {"value": v[..., :8], "initial_state": state[..., :8].contiguous()},
            {"value": v[:, :, :3], "g": given["g"][..., :3], "beta": given["beta"][..., :3]},
            {"g": given["g"][..., None]},
            {"beta": given["beta"][..., :1]},
            {"value": torch.cat([v, v], dim=1)},
            {name: given[name][:, :0] for name in ("query", "key", "value", "g", "beta")},
        ]
        for other in others:
            assert delta_rule(passed, **given | other) == "passed on"


def test_what_is_passed_on_is_what_was_given() -> None:
    given = ruled(3) | {"initial_state": None, "output_final_state": False, "cu_seqlens": None}

    def asked(query: Any, key: Any, value: Any, **options: Any) -> Any:
        return {"query": query, "key": key, "value": value, **options}

    found: Any = delta_rule(asked, **given, chunk_size=32)
    assert found.keys() == {*given, "chunk_size"}
    assert all(found[name] is given[name] for name in given)


def test_a_state_that_is_not_given_is_zero() -> None:
    for tokens in (1, 5):
        given = ruled(tokens)
        zero = torch.zeros_like(given["initial_state"])
        want, want_state = delta_rule(never, **given | {"initial_state": zero})
        got, state = delta_rule(never, **given | {"initial_state": None})
        assert torch.equal(got, want)
        assert torch.equal(state, want_state)  # type: ignore[arg-type]
        assert relative(got, transformers_rule(given | {"initial_state": None})[0]) <= 1e-5


def test_what_the_library_does_not_do_of_convolutions_is_transformers() -> None:
    x, inputs, weight = torch.zeros(1, 6, 1), torch.zeros(1, 6, 4), torch.zeros(6, 4)
    assert convolve(never, x, inputs, weight, None, "silu").shape == x.shape
    for arguments in (
        (x.expand(1, 6, 2), inputs, weight),
        (x, inputs, weight, None, "gelu"),
        (x, inputs.bfloat16(), weight),
        (x, inputs[..., :3], weight),
        (x, inputs.transpose(1, 2).contiguous().transpose(1, 2), weight),
    ):
        assert convolve(passed, *arguments) == "passed on"  # type: ignore[arg-type]
    x, bias, starts = torch.zeros(1, 6, 5), torch.zeros(6), torch.tensor([0, 2, 5])
    nothing = {"seq_idx": None, "cu_seq_lens_q": None, "use_cache": True}
    assert convolve_sequences(never, x, weight, bias, "swish", **nothing).shape == x.shape
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, weight, None, "gelu"), {}),
        ((x, weight.bfloat16()), {}),
        ((x, weight, bias.bfloat16()), {}),
        ((x.double(), weight.double()), {}),
        ((x, weight[:1]), {}),
        ((x[..., :0], weight), {}),
        ((x[:0], weight), {}),
        ((x, weight), {"seq_idx": torch.zeros(1, 5)}),
        ((x, weight), {"cu_seq_lens_q": starts}),
    ]
    for tensors, options in others:
        assert convolve_sequences(passed, *tensors, **options) == "passed on"  # type: ignore[comparison-overlap]

    def asked(*tensors: Any, **options: Any) -> Any:
        return tensors, options

    found = convolve_sequences(asked, x, weight, bias, activation="silu", seq_idx=starts)
    assert found == ((x, weight, bias), {"activation": "silu", "seq_idx": starts})


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_convolutions_of_either_order_of_memory(
    tokens: int, dtype: torch.dtype, activation: str | None
) -> None:
    x, weight = draw(2, 24, tokens, dtype=dtype), draw(24, 4, dtype=dtype)
    others = torch.full((2, 9, 24 + 3, tokens + 5), torch.nan, dtype=dtype)
    wide = others[:, 3, 2:26, 1 : tokens + 1].copy_(x)
    orders = [
        *(x, x.transpose(1, 2).contiguous().transpose(1, 2), wide),
        torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],  # neither lies together
        *(x[:, :1].expand_as(x), x[..., :1].expand_as(x)),
    ]
    assert 1 not in orders[3].stride()
    for given in orders:
        for bias in (None, draw(24, dtype=dtype)):
            want = qwen3_next.causal_conv1d_fn(given, weight, bias, activation=activation)
            got = convolve_sequences(never, given, weight, bias, activation)
            assert got.shape == want.shape
            assert got.dtype is dtype
            assert relative(got, want) <= (1e-6 if dtype is torch.float32 else 5e-3)
    strided = torch.stack([weight, weight], dim=-1)[..., 0]
    assert torch.equal(convolve_sequences(never, x, strided), convolve_sequences(never, x, weight))
