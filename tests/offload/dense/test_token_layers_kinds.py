"""Layers with latent or linear attention and shared experts, computed with their experts in one call."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_local
from moe_local.offload.native.library import library
from support.decoder_layers import IDS, apart, counted, layers_of, one_by_one, together
from support.variants import others_slow

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ library was not compiled")

torch.set_num_threads(1)

FAMILIES = {
    "qwen2_moe": [3],  # a shared expert, of which a sigmoid counts
    "deepseek_v2": [2],  # latent attention, whose angles are complex; the first layer has no experts
    "deepseek_v3": [2],
    "glm4_moe_lite": [2],
    "qwen3_5_moe": [4],  # states, but for the third layer
    "qwen3_next": [4],
}
"""By model type: how many layers each call of the library computes for a token."""


STATES = "qwen3_5_moe", "qwen3_next"


@pytest.fixture
def load(make_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """A model with all experts in RAM."""

    def load(family: str, dense: str = "bf16", **more: Any) -> Any:
        folder = make_checkpoint(family)
        return moe_local.load(folder, device="cpu", experts="nf4", dense=dense, context=64, **more)

    return load


def passes_of(family: str, tokens: int) -> list[int]:
    """The first layer has no state yet for the first token, which is transformers'."""
    first = [] if family in STATES else FAMILIES[family]
    return first + FAMILIES[family] * (tokens - 1)


@pytest.mark.parametrize(
    ("family", "dense"),
    [  # other families' matrices are too narrow here for NF4
        *((family, "bf16") for family in FAMILIES),
        *(pytest.param(family, "fp32", marks=pytest.mark.slow) for family in FAMILIES),
        ("qwen2_moe", "nf4"),
        ("qwen2_moe", "int8"),
    ],
)
def test_no_bit_changes(load: Callable[..., Any], family: str, dense: str, passes: list[int]) -> None:
    with load(family, dense) as model:
        passes.clear()
        got = one_by_one(model.hf)
        counts = counted(model)
    assert passes == passes_of(family, len(IDS))
    with load(family, dense) as model:
        passes.clear()
        assert torch.equal(one_by_one(apart(model.hf)), got)
        assert counted(model) == counts
    assert passes == []


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_several_sequences(load: Callable[..., Any], family: str, passes: list[int]) -> None:
    prompts, new = [[*IDS, 12, 13], IDS[2:8], [9, *IDS[::-1]]], 4
    with load(family, parallel=3) as model:
        passes.clear()
        got = together(model.hf, prompts, new)
        counts = counted(model)
    alone = [passes_of(family, len(prompt) - new) for prompt in prompts]
    assert passes == [*chain.from_iterable(alone), *FAMILIES[family] * new]
    with load(family, parallel=3) as model:
        assert all(map(torch.equal, together(apart(model.hf), prompts, new), got))
        assert counted(model) == counts


def linear(layer: Any) -> Any:
    return layer.linear_attn


def shared(layer: Any) -> Any:
    block = layer.mlp
    return block.shared_expert if hasattr(block, "shared_expert") else block.shared_experts


def down(layer: Any) -> Any:
    return shared(layer).down_proj


PLACES: list[tuple[str, Callable[[Any], nn.Module]]] = [
    ("qwen2_moe", shared),
    ("glm4_moe_lite", down),
    ("qwen3_5_moe", lambda layer: layer.mlp.shared_expert_gate),
    ("deepseek_v3", lambda layer: layer.self_attn.kv_b_proj),
    ("qwen3_5_moe", linear),
    ("qwen3_5_moe", lambda layer: layer.mlp.experts),
    ("qwen3_5_moe", lambda layer: layer),
]
MORE: list[tuple[str, Callable[[Any], nn.Module]]] = [
    *((family, shared) for family in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "qwen3_5_moe")),
    *((family, down) for family in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "qwen3_5_moe")),
    ("qwen2_moe", lambda layer: layer.mlp.shared_expert_gate),
    ("deepseek_v2", lambda layer: layer.self_attn),
    ("qwen3_5_moe", lambda layer: linear(layer).out_proj),
]


@pytest.mark.parametrize(
    ("family", "part"), [*PLACES, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)]
)
def test_a_hook_changes_what_goes_on(
    load: Callable[..., Any], family: str, part: Callable[[Any], nn.Module], passes: list[int]
) -> None:
    """Registered between two tokens: a layer with a state that were computed twice would be off."""
    found = []
    for alone in (False, True):
        with load(family) as model:
            hf = apart(model.hf) if alone else model.hf
            plain = one_by_one(hf)

            def register(place: int, hf: Any = hf) -> None:
                if place == 3:
                    # the first layers of DeepSeek's have no experts; that of Qwen3.5 keeps a state
                    layer = layers_of(hf)[0 if family == "qwen3_5_moe" else 2]
                    part(layer).register_forward_hook(doubled)

            found.append(one_by_one(hf, before=register))
        assert torch.equal(found[-1][:3], plain[:3])
        assert not torch.equal(found[-1][3:], plain[3:])
    assert torch.equal(found[0], found[1])
    assert passes


def doubled(_: nn.Module, args: Any, output: Any) -> Any:
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def moved(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.data = weight.data * 1.5


def corrected(layer: Any) -> None:
    router = layer.mlp.gate
    router.e_score_correction_bias = router.e_score_correction_bias + torch.arange(router.weight.shape[0])


def without_activation(layer: Any) -> None:
    shared(layer).act_fn = nn.Identity()


def test_an_activation_that_is_a_function_is_watched(load: Callable[..., Any], passes: list[int]) -> None:
    found = []
    for alone in (False, True):
        with load("qwen2_moe", "fp32") as model:
            hf = apart(model.hf) if alone else model.hf
            for layer in layers_of(hf):
                del shared(layer).act_fn
                shared(layer).act_fn = nn.functional.silu

            def between(place: int, hf: Any = hf) -> None:
                if place == 3:
                    shared(layers_of(hf)[1]).act_fn = torch.tanh

            found.append(one_by_one(hf, before=between))
    assert torch.equal(found[0], found[1])


CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a shared expert's weights move": ("qwen2_moe", lambda layer: moved(shared(layer))),
    "DeepSeek's": ("deepseek_v3", lambda layer: moved(shared(layer))),
    "its gate's": ("qwen3_5_moe", lambda layer: moved(layer.mlp.shared_expert_gate)),
    "another activation": ("qwen2_moe", without_activation),
    "another correction": ("deepseek_v3", corrected),
    "another scaling": ("glm4_moe_lite", lambda layer: setattr(layer.self_attn, "scaling", 3.0)),
    "a norm's epsilon": (
        "deepseek_v3",
        lambda layer: setattr(layer.self_attn.kv_a_layernorm, "variance_epsilon", 9.0),
    ),
    "latents' weights": ("deepseek_v2", lambda layer: moved(layer.self_attn)),
    "how states fade": ("qwen3_5_moe", lambda layer: moved(linear(layer))),
}


@pytest.mark.parametrize("change", others_slow(CHANGES, list(CHANGES)[::2]))
def test_changes_between_tokens_are_noticed(load: Callable[..., Any], change: str, passes: list[int]) -> None:
    family, make = CHANGES[change]
    found = []
    for alone in (False, True):
        with load(family, "fp32") as model:
            hf = apart(model.hf) if alone else model.hf
            plain = one_by_one(hf)

            def between(place: int, hf: Any = hf) -> None:
                if place == 3:
                    make(layers_of(hf)[1])

            found.append(one_by_one(hf, before=between))
        assert torch.equal(found[-1][:3], plain[:3])
        assert not torch.equal(found[-1][3:], plain[3:])
    assert torch.equal(found[0], found[1])
