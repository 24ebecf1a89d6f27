"""Tokens chosen for a few queries at a time, against transformers' own indexers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from moe_local.offload.checkpoint.spec import model_spec
from moe_local.offload.dense import index_pieces as module_under_test
from moe_local.offload.dense.index_pieces import SCORES_BYTES, SHORTEST, use_index_pieces
from moe_local.offload.engine.memory import make_kv
from moe_local.offload.modeling.names import cache_name
from moe_local.offload.plan.footprint import kv_bytes
from support import tiny_models

TOKENS = 60


@pytest.fixture(scope="module", params=["deepseek_v32", "glm_moe_dsa", "deepseek_v4"])
def plain(request: pytest.FixtureRequest) -> Any:
    """As transformers makes it; a query sees 16 tokens."""
    return tiny_models.tiny_model(request.param)


@pytest.fixture
def hf(plain: Any) -> Any:
    model = copy.deepcopy(plain)
    use_index_pieces(model)
    assert {(layer.numbers, layer.least) for layer in indexers(model)} == {(SCORES_BYTES // 4, SHORTEST)}
    return model


def indexers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "numbers")]


def logits(model: Any, cuts: Sequence[int], memory: Any = None) -> torch.Tensor:
    """Of a prompt in several forwards."""
    ids = torch.arange(3, 3 + TOKENS)[None]
    options = {cache_name(model.forward): memory or DynamicCache(config=model.config), "use_cache": True}
    found = []
    with torch.no_grad():
        for first, end in zip([0, *cuts], [*cuts, TOKENS], strict=True):
            found.append(model(input_ids=ids[:, first:end], **options).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("piece", [16, 7])
@pytest.mark.parametrize("cuts", [[], [25, 26]])
def test_pieces_change_nothing(plain: Any, hf: Any, piece: int, cuts: list[int]) -> None:
    for layer in indexers(hf):
        layer.numbers, layer.least = 0, piece
    assert torch.equal(logits(hf, cuts), logits(plain, cuts))


@pytest.mark.parametrize("plain", ["deepseek_v32", "glm_moe_dsa"], indirect=True)
def test_the_engines_memory_gets_every_key(plain: Any, hf: Any) -> None:
    for layer in indexers(hf):
        layer.numbers, layer.least = 0, 7
    kept = []
    for model in (plain, hf):
        kv = make_kv(model, 1, TOKENS)
        logits(model, [], kv.row(kv.join()))
        kept += [[layer.indexer for layer in kv.layers]]
    for want, got in zip(*kept, strict=True):
        assert want.shape[1] == TOKENS
        assert torch.equal(got, want)


class Largest(TorchDispatchMode):
    """Notes the most numbers for which a tensor of four dimensions has memory that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dim() == 4:
            self.numel = max(self.numel, found.untyped_storage().nbytes() // found.itemsize)
        return found


@pytest.mark.parametrize("plain", ["deepseek_v32", "glm_moe_dsa"], indirect=True)
def test_scores_of_a_few_queries_are_there_at_a_time(plain: Any, hf: Any) -> None:
    """With 32 heads of an indexer they are the largest of all there is."""
    found, name = [], cache_name(plain.forward)
    for model in (plain, hf):
        for layer in indexers(hf):
            layer.numbers = 10 * layer.n_heads * TOKENS
            layer.least = 1
        module = next(module for module in model.modules() if type(module).__name__.endswith("Indexer"))
        with Largest() as largest, torch.no_grad():
            config = model.config
            memory = DynamicCache(config=config)
            angles = torch.zeros(2, 1, TOKENS, config.qk_rope_head_dim)
            module(
                torch.ones(1, TOKENS, config.hidden_size),
                torch.ones(1, TOKENS, config.q_lora_rank),
                (angles[0], angles[1]),
                torch.ones(1, TOKENS, TOKENS, dtype=torch.bool).tril(),
                torch.arange(TOKENS)[None],
                **{name: memory},
            )
        found.append(largest.numel)
    heads = indexers(hf)[0].n_heads
    assert found[0] >= heads * TOKENS * TOKENS
    assert found[1] <= max(10 * heads * TOKENS, TOKENS * heads * indexers(hf)[0].head_dim)


def test_without_a_cache_all_is_as_ever(plain: Any, hf: Any) -> None:
    ids = torch.arange(3, 3 + TOKENS)[None]
    for layer in indexers(hf):
        layer.numbers, layer.least = 0, 7
    with torch.no_grad():
        got, want = (model(input_ids=ids, use_cache=False).logits for model in (hf, plain))
    assert torch.equal(got, want)


def test_what_comes_out_differently_stays(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(model: Any, change: Any) -> str:
        change()
        return "logits were off"

    monkeypatch.setattr(module_under_test, "difference", differs)
    model = copy.deepcopy(plain)
    use_index_pieces(model)
    assert not indexers(model)
    assert list(map(type, model.modules())) == list(map(type, plain.modules()))


@pytest.mark.parametrize("plain", ["deepseek_v32", "glm_moe_dsa"], indirect=True)
def test_what_memory_is_planned_for_keys(plain: Any) -> None:
    """Up to transformers 5.17 these models keep the keys and values of all heads."""
    assert make_kv(plain, 2, 50).nbytes == 2 * kv_bytes(model_spec(plain.config), 50, torch.float32)
