"""Adapts routed experts that do not use transformers' experts interface, so that they look as if they did.

The interface's decorator sets attributes on a module (`has_gate` and the like), and the module is called with
the tokens, the chosen experts and their weights. Three families do not use it: Llama 4 multiplies all tokens
with all experts, Switch Transformers has one module per expert, and Step 3.7 lacks the attributes only.
`decorate` gives them the attributes, packed parameters and call signature of the interface, so that the rest
of the code treats all experts alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_local.cache.errors import CheckpointError
from moe_local.offload.modeling.stand_in import stand_in


def is_experts_module(module: nn.Module) -> bool:
    """Whether this module uses transformers' experts interface, whose decorator sets these attributes."""
    return all(hasattr(module, name) for name in ("has_gate", "is_concatenated", "is_transposed"))


def decorate(model: nn.Module) -> None:
    """Adapt those experts of `model`, on the meta device, that do not use the interface.

    Raises CheckpointError if there are experts that neither the interface nor this module supports, since
    they would be loaded into memory whole.
    """
    for module in list(model.modules()):
        kind = type(module).__name__
        if kind == "Llama4TextMoe":
            _decorate_llama4(module)
        elif kind == "SwitchTransformersSparseMLP":
            _decorate_switch(module)
        elif kind == "Step3p7Experts":
            _describe(module, transposed=False)
    for name, module in _unknown_experts(model):
        raise CheckpointError(
            f"the routed experts of {type(model).__name__} ({name}, a {type(module).__name__}) are none that "
            "transformers' experts interface serves, and moe-local has no adapter for them"
        )


def conversion_rules(model: nn.Module) -> list[Any]:
    """Conversion rules for experts that `decorate` packed, in addition to transformers' own."""
    from transformers.core_model_loading import MergeModulelist, WeightConverter

    if not any(isinstance(module, PackedExperts) for module in model.modules()):
        return []
    return [
        WeightConverter(f"experts.expert_*.{stored}.weight", f"experts.{packed}", [MergeModulelist(dim=0)])
        for stored, packed in (("wi", "up_proj"), ("wo", "down_proj"))
    ]


def _unknown_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold routed experts, judging by their class's name, without the interface's attributes."""
    known: set[str] = set()
    for name, module in model.named_modules():
        if is_experts_module(module) or name.rpartition(".")[0] in known:
            known.add(name)  # so that its descendants are skipped, too
            continue
        kind = type(module).__name__
        routed = "Experts" in kind and "Shared" not in kind and kind != "OffloadedExperts"
        if routed and any(True for _ in module.parameters()):
            yield name, module


def _describe(experts: Any, *, transposed: bool) -> None:
    """Set the interface's attributes on experts with gate and up in one matrix, and without biases."""
    experts.has_gate, experts.has_bias = True, False
    experts.is_transposed, experts.is_concatenated = transposed, True
    experts.config = None


# --- Llama 4


def _decorate_llama4(block: Any) -> None:
    experts = block.experts
    if not hasattr(experts, "gate_up_proj") or not hasattr(block, "shared_expert"):
        raise CheckpointError(
            f"{type(block).__name__} of this transformers is not the one that moe-local has an adapter for"
        )
    kinds: tuple[Any, Any] = type(block), type(experts)
    block.__class__, experts.__class__ = _llama4_block(kinds[0]), _llama4_experts(kinds[1])
    _describe(experts, transposed=True)


@cache
def _llama4_experts(cls: Any) -> Any:
    def apply_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: torch.Tensor = up * self.act_fn(gate)
        return gated

    return type(cls.__name__, (cls,), {"_apply_gate": apply_gate, "__module__": cls.__module__})


@cache
def _llama4_block(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, D] -> [B * T, D] and the router's logits. The router's weights scale the experts' inputs,
        not their outputs, so each (token, expert) pair is passed as a token of its own."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        _, logits = self.router(x)
        chosen, index = logits.topk(self.top_k, dim=-1)
        scale = chosen.float().sigmoid().to(x.dtype)
        scaled = (x.unsqueeze(1) * scale.unsqueeze(-1)).reshape(-1, self.hidden_dim)
        pairs = index.reshape(-1, 1)
        answers = self.experts(scaled, pairs, torch.ones_like(pairs, dtype=x.dtype))
        return self.shared_expert(x) + answers.view(*index.shape, -1).sum(dim=1), logits

    return stand_in(cls, _llama4_block, forward)


# --- Switch Transformers


class PackedExperts(nn.Module):
    """Experts of two matrices and an activation, packed as in the interface: [E, F, D] and [E, D, F].

    Exists only on the meta device: it provides shapes until an OffloadedExperts replaces it.
    """

    top_k = 1
    has_gate = has_bias = is_transposed = False
    is_concatenated = True
    config = None

    def __init__(self, original: Any) -> None:
        super().__init__()
        first = original["expert_0"]
        self.num_experts = int(original.num_experts)
        self.act_fn = first.act
        for name, linear in (("up_proj", first.wi), ("down_proj", first.wo)):
            shape = self.num_experts, *linear.weight.shape
            setattr(self, name, nn.Parameter(torch.empty(shape, device="meta", dtype=linear.weight.dtype)))

    def _apply_gate(self, hidden: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = self.act_fn(hidden)
        return activated


def _decorate_switch(block: Any) -> None:
    if isinstance(block.experts, PackedExperts):
        return
    kind: Any = type(block)
    block.__class__ = _switch_block(kind)
    block.experts = PackedExperts(block.experts)
    block._is_hf_initialized = True  # or the loader would initialize the replaced modules


def _choice(routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(the one-hot expert of each token, zeros beyond the capacity; its weight), from a router's outputs.

    In transformers 5.17 they are the last two outputs, and no token is dropped.
    """
    first, second, third = routed
    return (second, third) if first.is_floating_point() else (first, second)


@cache
def _switch_block(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; zeros for tokens beyond the capacity of their expert."""
        chosen, weights = _choice(self.router(hidden_states))
        x, weights = hidden_states.reshape(-1, hidden_states.shape[-1]), weights.reshape(-1, 1)
        chosen = chosen.reshape(x.shape[0], -1)
        index = chosen.argmax(dim=-1, keepdim=True)
        output: torch.Tensor
        if hidden_states.shape[1] <= self.router.expert_capacity:  # no token is dropped
            output = self.experts(x, index, weights)
            return output.view_as(hidden_states)
        served = chosen.any(dim=-1).nonzero().flatten()
        output = torch.zeros_like(x)
        output[served] = self.experts(x[served], index[served], weights[served])
        return output.view_as(hidden_states)

    return stand_in(cls, _switch_block, forward)
