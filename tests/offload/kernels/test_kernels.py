"""One expert from its flat buffer: against plain torch on the weights it was made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_local.cache.errors import OptionError
from moe_local.offload.kernels.bnb import nf4_linear
from moe_local.offload.kernels.expert import ExpertKernels
from moe_local.offload.kernels.reference import reference_linear
from moe_local.offload.native.library import library
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import Layout, TensorSpec
from support import expert_math
from support.packed import off

D, FF = 128, 192


class Math(expert_math.Math):
    """With a factor at the end."""

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        return 3 * output


def an_expert(
    format: str, *, has_gate: bool = True, has_bias: bool = False, device: str = "cpu"
) -> tuple[Layout, torch.Tensor, dict[str, torch.Tensor]]:
    """Layout, buffer in a slot that is longer than needed, and the weights that the buffer stands for."""
    first = "gate_up_proj" if has_gate else "up_proj"
    tensors = [TensorSpec(first, (2 * FF if has_gate else FF, D)), TensorSpec("down_proj", (D, FF))]
    if has_bias:
        tensors += [TensorSpec(f"{t.name}_bias", t.shape[:1]) for t in tuple(tensors)]
    generator = torch.Generator().manual_seed(3)
    weights = {t.name: torch.randn(t.shape, generator=generator) / 8 for t in tensors}
    codec = codec_for(format)
    layout = codec.layout(tensors)
    slot = torch.full((layout.nbytes + 4096,), 0xA5, dtype=torch.uint8)
    codec.encode(weights, layout, slot[: layout.nbytes])
    return layout, slot.to(device), codec.decode(slot, layout, torch.float32)


def plainly(math: Math, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """By matrix products and sums, in float64."""
    w = {name: weight.double().to(x.device) for name, weight in weights.items()}
    first = "gate_up_proj" if math.has_gate else "up_proj"
    hidden = x.double() @ w[first].T + w.get(f"{first}_bias", 0)
    return math.finish(math.activate(hidden) @ w["down_proj"].T + w.get("down_proj_bias", 0))


@pytest.mark.parametrize("tokens", [1, 2, 300])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16", "int8", "nf4"])
def test_equals_the_plain_products(format: str, has_gate: bool, has_bias: bool, tokens: int) -> None:
    math = Math(has_gate=has_gate, has_bias=has_bias)
    layout, buffer, weights = an_expert(format, has_gate=has_gate, has_bias=has_bias)
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(tokens))
    before = buffer.clone()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        y = ExpertKernels().forward(math, x.to(dtype), buffer, layout)
        assert y.dtype == dtype
        assert y.shape == (tokens, D)
        assert off(y, plainly(math, x.to(dtype), weights)) < tolerance
    assert torch.equal(buffer, before)


def test_each_token_has_the_same_result_alone_and_among_others() -> None:
    math = Math(has_gate=True, has_bias=True)
    layout, buffer, _ = an_expert("fp32", has_bias=True)
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    together = ExpertKernels().forward(math, x, buffer, layout)
    alone = torch.cat([ExpertKernels().forward(math, x[i : i + 1], buffer, layout) for i in range(40)])
    assert off(together, alone.double()) < 1e-6


@pytest.mark.parametrize("format", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remembering_slots_changes_nothing_when_other_experts_come_into_them(
    format: str, dtype: torch.dtype
) -> None:
    math = Math(has_gate=True, has_bias=True)
    layout, first, _ = an_expert(format, has_bias=True)
    codec = codec_for(format)
    contents = [first.clone()]
    for seed in range(1, 4):
        generator = torch.Generator().manual_seed(seed)
        weights = {t.name: torch.randn(t.shape, generator=generator) / 8 for t in layout.tensors}
        contents.append(first.clone())
        codec.encode(weights, layout, contents[-1][: layout.nbytes])
    slots = [first.clone(), first.clone()]
    kernels = ExpertKernels()
    for step in range(12):
        slot = slots[step % 2]
        slot.copy_(contents[step % 3])
        x = torch.randn(1 + step % 2, D).to(dtype if step < 8 else torch.float32)
        want = ExpertKernels().forward(math, x, contents[step % 3], layout)
        assert torch.equal(kernels.forward(math, x, slot, layout), want)
        other = Layout(layout.format, layout.tensors, layout.segments, layout.nbytes)  # equal, yet another
        assert torch.equal(kernels.forward(math, x, slot, other), want)


def test_what_is_remembered_is_no_copy_of_the_weights() -> None:
    math = Math(has_gate=True, has_bias=False)
    x = torch.randn(1, D)
    in_place = int(library() is not None)  # torch has to convert bf16 for an fp32 input, the library has not
    for format, kept in (("fp32", 1), ("bf16", in_place), ("nf4", 1)):
        kernels = ExpertKernels()
        layout, buffer, _ = an_expert(format)
        kernels.forward(math, x, buffer, layout)
        assert len(kernels._linears) == kept


def test_a_bias_is_added_only_where_the_architecture_has_one() -> None:
    layout, buffer, weights = an_expert("fp32", has_bias=True)
    x = torch.randn(2, D)
    decoded = codec_for("fp32").decode(buffer, layout, torch.float32)
    without = reference_linear(decoded, has_bias=False)(
        x, "down_proj" if x.shape[1] == FF else "gate_up_proj"
    )
    with_bias = reference_linear(decoded, has_bias=True)(x, "gate_up_proj")
    assert torch.allclose(with_bias - without, weights["gate_up_proj_bias"].expand(2, -1), atol=1e-5)


def test_an_unknown_format_is_refused() -> None:
    layout, buffer, _ = an_expert("fp32")
    unknown = Layout("zip", layout.tensors, layout.segments, layout.nbytes)
    with pytest.raises(OptionError, match="zip"):
        ExpertKernels().forward(Math(has_gate=True, has_bias=False), torch.randn(1, D), buffer, unknown)


def check_fused_nf4(device: str, dtypes: list[tuple[torch.dtype, float]], tokens: list[int]) -> None:
    """bitsandbytes' product in place, against the decoded weights."""
    layout, buffer, weights = an_expert("nf4", has_bias=True, device=device)
    for dtype, tolerance in dtypes:
        linear = nf4_linear(buffer, layout, dtype, has_bias=True)
        plain = nf4_linear(buffer, layout, dtype, has_bias=False)
        for count in tokens:
            x = torch.randn(count, D, generator=torch.Generator().manual_seed(count)).to(device, dtype)
            want = x.double() @ weights["gate_up_proj"].double().to(device).T
            assert off(plain(x, "gate_up_proj"), want) < tolerance
            want = want + weights["gate_up_proj_bias"].double().to(device)
            got = linear(x, "gate_up_proj")
            assert got.dtype == dtype
            assert off(got, want) < tolerance


def test_the_fused_nf4_product_equals_the_reference() -> None:
    check_fused_nf4("cpu", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], [1, 5])


@pytest.mark.gpu
def test_the_fused_nf4_product_equals_the_reference_on_a_gpu() -> None:
    check_fused_nf4(
        "cuda", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)], [1, 5, 300]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["nf4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_gpu_and_cpu_agree(format: str, tokens: int) -> None:
    math: Any = Math(has_gate=True, has_bias=True)
    layout, buffer, weights = an_expert(format, has_bias=True, device="cuda")
    x = torch.randn(tokens, D, device="cuda").bfloat16()
    assert off(ExpertKernels().forward(math, x, buffer, layout), plainly(math, x, weights)) < 2e-2
