"""Which norm feeds which router, found by one token through a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_local.offload.checkpoint.checkpoint import read_config
from moe_local.offload.checkpoint.skeleton import load_skeleton
from moe_local.offload.prefetch.discover import Probe
from moe_local.offload.prefetch.routers import router_of

TYPES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "qwen2_moe", "olmoe", "deepseek_v3")


def skeleton(folder: Path) -> Any:
    cpu = torch.device("cpu")
    return load_skeleton(folder, read_config(folder), dense="auto", dtype=torch.float32, device=cpu)


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs)
        for m in model.modules()
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_finds_router_and_norm_of_every_layer(make_checkpoint: Callable[..., Path], model_type: str) -> None:
    hf = skeleton(make_checkpoint(model_type))
    before = hooks(hf)
    with Probe(hf) as probe, torch.no_grad():
        hf(torch.tensor([[5, 6, 7]]))
    assert hooks(hf) == before
    assert not probe._kept
    assert not probe._made_by
    name_of = {id(module): name for name, module in hf.named_modules()}
    found = [(name_of[id(site.router)], name_of[id(site.norm)]) for site in probe.sites if site is not None]
    first = 1 if model_type == "deepseek_v3" else 0
    moe, router = {
        "granitemoe": ("block_sparse_moe", "router"),
        "gpt_oss": ("mlp", "router"),
        "phimoe": ("mlp", "router"),
    }.get(model_type, ("mlp", "gate"))
    assert found == [
        (f"model.layers.{i}.{moe}.{router}", f"model.layers.{i}.post_attention_layernorm")
        for i in range(first, 3)
    ]


def test_a_router_that_wants_batches_gets_one(make_checkpoint: Callable[..., Path]) -> None:
    hf = skeleton(make_checkpoint("afmoe"))
    with Probe(hf) as probe, torch.no_grad():
        hf(torch.tensor([[5, 6, 7]]))
    assert [site is not None for site in probe.sites] == [True] * len(probe.sites)
    for site in probe.sites:
        assert site is not None
        weights, experts = site.route(torch.randn(4, 64))
        assert weights.shape == experts.shape == (4, 2)


def test_a_failed_forward_leaves_no_hook(make_checkpoint: Callable[..., Path]) -> None:
    hf = skeleton(make_checkpoint("mixtral"))
    before = hooks(hf)
    with pytest.raises(IndexError), Probe(hf), torch.no_grad():
        hf(torch.tensor([[10**6]]))
    assert hooks(hf) == before


class AskedWithMore(nn.Module):
    """A router that wants something besides the hidden state."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.router(hidden, 1.0)


class Greedy(nn.Module):
    """Returns logits only: what it chose cannot be seen."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_layers_that_cannot_be_predicted_have_no_site(make_checkpoint: Callable[..., Path]) -> None:
    hf = skeleton(make_checkpoint("mixtral"))
    first, second, third = (layer.mlp for layer in hf.model.layers)
    unnormed = first.gate.forward
    first.gate.forward = lambda hidden: unnormed(hidden)
    first.register_forward_pre_hook(lambda module, args: (args[0] + 0.0,))  # no norm's output any more
    second.gate.register_forward_hook(lambda module, args, output: (output[0], output[2], output[2]))
    with Probe(hf) as probe, torch.no_grad():
        hf(torch.tensor([[5]]))
    assert probe.sites[0] is None
    assert probe.sites[1] is None  # two integer tensors: which is the choice?
    assert probe.sites[2] is not None
    assert probe.sites[2].router is third.gate


def test_a_router_is_the_sibling_called_gate_or_router(make_checkpoint: Callable[..., Path]) -> None:
    hf = skeleton(make_checkpoint("mixtral"))
    assert router_of(hf, "model.layers.1.mlp.experts") is hf.model.layers[1].mlp.gate
    del hf.model.layers[1].mlp.gate
    assert router_of(hf, "model.layers.1.mlp.experts") is None
