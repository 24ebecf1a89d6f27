"""Every family loads from its Hub layout, offloads, and generates what transformers does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moe_local
from moe_local.cache.errors import CheckpointError, MoeLocalError
from moe_local.offload.checkpoint.checkpoint import read_config
from moe_local.offload.checkpoint.skeleton import load_skeleton
from moe_local.offload.checkpoint.spec import class_config, meta_model, model_class, model_spec
from moe_local.offload.engine.encoder_decoder import as_decoder
from moe_local.offload.engine.kv_slab import probe_cache
from moe_local.offload.experts import OffloadedExperts
from moe_local.offload.prefetch.discover import Probe
from support import tiny_models
from support.variants import others_slow

FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "llama4",
    "gemma4",
    "gpt_oss",
    "glm4_moe",
    "olmoe",
    "phimoe",
    "granitemoe",
    "minimax_m2",
    "ernie4_5_moe",
    "jamba",
    "switch_transformers",
)
"""transformers' types of the families that docs/models.md names."""

UNLIKE = (
    *("mixtral", "qwen3_moe", "qwen3_next", "deepseek_v3", "deepseek_v4"),
    *("llama4", "gemma4", "gpt_oss", "jamba", "switch_transformers"),
)
"""Of these, one of each form; the others are slow where a test is repeated for each."""

UNNAMED = ("glm4_moe_lite", "glm_moe_dsa", "granitemoehybrid", "hunyuan_v1_moe", "lfm2_moe", "qwen3_vl_moe")
"""Some of those that work without being named..."""

NEWER = (
    *("bailing_hybrid", "cohere2_moe", "dots1", "exaone_moe", "glm5_next", "hy_v3", "kimi_linear"),
    *("mimo_v2_flash", "minimax_m3_vl", "mistral4", "nemotron_h", "solar_open", "step3p7"),
)
"""...and others, of which the oldest supported transformers lacks some. All of their tests are slow."""

SLOTS = 3
NEW = 12
EXACT = {"experts": "fp32", "dense": "fp32", "context": 64}
IDS = torch.tensor([[5, 77, 130, 9, 201, 33, 8, 300, 4, 4, 91, 17, 260, 12, 41, 250, 99]])


OLD_ROUTER = version("transformers").startswith("5.17.")
"""Switch's router as transformers had it before: its results in another order, and no token left out."""


def known(model_types: Iterable[str]) -> list[Any]:
    """As parameters of tests, which skip what this transformers does not have."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in CONFIG_MAPPING, reason="newer transformers"))
        for name in model_types
    ]


@pytest.fixture(scope="module")
def greedy(make_checkpoint: Callable[..., Path]) -> Callable[..., list[int]]:
    """greedy(model_type, ids, new) -> what transformers' own model of that checkpoint goes on with."""
    models: dict[str, Any] = {}

    def ids(model_type: str, prompt: torch.Tensor, new: int) -> list[int]:
        folder = make_checkpoint(model_type)
        if model_type not in models:
            config = read_config(folder)
            kind: Any = model_class(config)
            models[model_type] = kind.from_pretrained(
                folder, config=class_config(config), dtype=torch.float32
            ).eval()
        with torch.inference_mode():
            found = models[model_type].generate(prompt, max_new_tokens=new, eos_token_id=None)
        return found[0, -new:].tolist()

    return ids


@pytest.mark.parametrize("model_type", others_slow(FAMILIES, UNLIKE))
def test_greedy_ids_are_those_of_transformers(
    make_checkpoint: Callable[..., Path], greedy: Callable[..., list[int]], model_type: str
) -> None:
    with moe_local.load(make_checkpoint(model_type), slots=SLOTS, prefetch="router", **EXACT) as model:
        output = model.generate(IDS[0].tolist(), max_new_tokens=NEW, eos_token_id=None)
        expected = greedy(model_type, IDS, NEW)
        assert output.token_ids == expected
        assert len(set(expected)) > 2
        stats = model.stats()
        assert stats.misses > 0
        assert stats.evictions > 0
        assert stats.prefetch.issued > 0 or (OLD_ROUTER and model_type == "switch_transformers")
        model.check_integrity()
        # all that is resident is no routed expert's
        spec = model.plan.request.spec
        resident = {name for name, _ in model.hf.named_parameters()}
        assert resident == {tensor.name for tensor in spec.dense}
        assert not [name for name in resident if ".experts." in name]
        assert sum(isinstance(module, OffloadedExperts) for module in model.hf.modules()) == len(spec.layers)


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", ["off", "router"])
@pytest.mark.parametrize("model_type", [*FAMILIES, *UNNAMED, *known(NEWER)])
def test_longer_answers_tensors_and_parts_of_prompts(
    make_checkpoint: Callable[..., Path], greedy: Callable[..., list[int]], model_type: str, prefetch: str
) -> None:
    """Past every window and compressed block, and with prompts in chunks of five tokens."""
    expected = greedy(model_type, IDS, 40)
    with moe_local.load(make_checkpoint(model_type), slots=SLOTS, prefetch=prefetch, **EXACT) as model:
        ids = model.generate(IDS, max_new_tokens=40, eos_token_id=None)
        assert ids[0, -40:].tolist() == expected
        model._open().engine.chunk = 5
        output = model.generate(IDS[0].tolist(), max_new_tokens=40, eos_token_id=None)
        assert output.token_ids == expected
        model.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*FAMILIES[:-1], *UNNAMED, *known(NEWER)])
def test_three_at_a_time(
    make_checkpoint: Callable[..., Path], greedy: Callable[..., list[int]], model_type: str
) -> None:
    """Prompts of different lengths, together past every window."""
    prompts = [IDS[:, :11], IDS, IDS[:, 4:]]
    with moe_local.load(make_checkpoint(model_type), slots=SLOTS, parallel=3, **EXACT) as model:
        width = IDS.shape[1]
        rows = [torch.cat([torch.zeros(1, width - p.shape[1], dtype=torch.long), p], 1) for p in prompts]
        mask = torch.cat([torch.arange(width)[None] >= width - p.shape[1] for p in prompts]).long()
        found = model.generate(torch.cat(rows), attention_mask=mask, max_new_tokens=30, eos_token_id=None)
        for row, prompt in enumerate(prompts):
            assert found[row, -30:].tolist() == greedy(model_type, prompt, 30)
        model.check_integrity()


@pytest.mark.parametrize(
    "model_type", ["deepseek_v4", "gemma4", "llama4", "minimax_m2", "lfm2_moe", "switch_transformers"]
)
def test_routers_of_other_forms_are_asked_as_the_model_asks_them(
    make_checkpoint: Callable[..., Path], model_type: str
) -> None:
    """Asked about the residual of their own layer, they choose what the layer was given."""
    if OLD_ROUTER and model_type == "switch_transformers":
        pytest.skip("this transformers' router has a form that is not asked")
    folder = make_checkpoint(model_type)
    hf = load_skeleton(
        folder, read_config(folder), dense="fp32", dtype=torch.float32, device=torch.device("cpu")
    )
    with Probe(hf) as probe:
        probe_cache(as_decoder(hf))
    sites = [site for site in probe.sites if site is not None]
    assert len(sites) == len(probe.sites)
    residuals: dict[int, torch.Tensor] = {}
    chosen: dict[int, torch.Tensor] = {}
    for layer, site in enumerate(sites):
        site.norm.register_forward_pre_hook(
            lambda module, args, layer=layer: residuals.__setitem__(layer, args[0])
        )
    for module in hf.modules():
        if isinstance(module, OffloadedExperts):
            module.register_forward_pre_hook(lambda m, args: chosen.__setitem__(m.index, args[1]))
    inputs = {"decoder_input_ids": IDS[:, :1]} if model_type == "switch_transformers" else {}
    with torch.inference_mode():
        hf(input_ids=IDS[:, 5:6], **inputs)
        for layer, site in enumerate(sites):
            weights, index = site.route(residuals[layer])
            assert weights.shape == index.shape
            assert sorted(index.flatten().tolist()) == sorted(chosen[layer].flatten().tolist())


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "llama4", "gemma4"])
def test_of_models_that_see_the_text_is_loaded(make_checkpoint: Callable[..., Path], model_type: str) -> None:
    spec = model_spec(read_config(make_checkpoint(model_type)))
    assert not [tensor.name for tensor in spec.dense if "vision" in tensor.name or "visual" in tensor.name]


def test_shared_experts_and_dense_first_layers_are_resident(make_checkpoint: Callable[..., Path]) -> None:
    spec = model_spec(read_config(make_checkpoint("deepseek_v3")))
    assert [layer.name for layer in spec.layers] == [f"model.layers.{i}.mlp.experts" for i in (1, 2)]
    dense = {tensor.name for tensor in spec.dense}
    assert "model.layers.0.mlp.gate_proj.weight" in dense
    assert "model.layers.1.mlp.shared_experts.gate_proj.weight" in dense


def test_experts_that_nobody_would_offload_are_refused() -> None:
    """Rather than loaded whole: DBRX's are neither served by the interface nor adapted."""
    from transformers import DbrxConfig

    config = DbrxConfig(
        d_model=64,
        n_heads=4,
        n_layers=2,
        vocab_size=tiny_models.VOCAB,
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
    )
    with pytest.raises(CheckpointError, match=r"DbrxForCausalLM .*DbrxExperts\).* no adapter") as info:
        meta_model(config)
    assert "\n" not in str(info.value)


def test_switch_routers_of_an_older_transformers_are_understood(make_checkpoint: Callable[..., Path]) -> None:
    with moe_local.load(make_checkpoint("switch_transformers"), prefetch="off", **EXACT) as model:
        encoder = model.hf.get_encoder()
        for block in [module for module in model.hf.modules() if hasattr(module, "router")]:
            block.router.expert_capacity = IDS.shape[1]
        with torch.inference_mode():
            want = encoder(IDS).last_hidden_state
            for block in [module for module in encoder.modules() if hasattr(module, "router")]:
                route = block.router.forward
                block.router.forward = lambda hidden, route=route: _in_the_other_order(route(hidden))
            assert torch.equal(encoder(IDS).last_hidden_state, want)


def _in_the_other_order(routed: Any) -> Any:
    first, second, third = routed
    if first.is_floating_point():  # as of 5.17: the probabilities of all experts, one-hot, the chosen one's
        return second, third, first
    return third, first, second


@pytest.mark.skipif(OLD_ROUTER, reason="this transformers leaves nobody out")
def test_switch_leaves_out_tokens_beyond_the_capacity(
    make_checkpoint: Callable[..., Path], greedy: Callable[..., list[int]]
) -> None:
    """Three tokens an expert, of 17: the encoder's answer depends on which are left out."""
    few = make_checkpoint("switch_transformers")
    with moe_local.load(few, slots=SLOTS, prefetch="off", **EXACT) as model:
        blocks = [module for module in model.hf.modules() if hasattr(module, "router")]
        assert {block.router.expert_capacity for block in blocks} == {3}
        with torch.inference_mode():
            chosen = blocks[0].router(model.hf.get_encoder().embed_tokens(IDS))[0]
            assert bool((chosen.sum(-1) == 0).any())
            limited = model.hf.get_encoder()(IDS).last_hidden_state
            for block in blocks:
                block.router.expert_capacity = 64
            assert not torch.allclose(model.hf.get_encoder()(IDS).last_hidden_state, limited)


def test_an_answer_of_an_encoder_decoder_survives_a_failed_step(
    make_checkpoint: Callable[..., Path], greedy: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is dropped, and computed again: the prompt by the encoder, then token by token."""
    expected = greedy("switch_transformers", IDS, NEW)
    with moe_local.load(make_checkpoint("switch_transformers"), slots=SLOTS, **EXACT) as model:
        engine = model._open().engine
        sequence = engine.join(IDS[0].tolist(), _settings(model))
        for _ in range(5):
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_sample", lambda *args: (_ for _ in ()).throw(RuntimeError("gone")))
            with pytest.raises(RuntimeError, match="gone"):
                engine.step()
        engine.check_integrity()
        while sequence.finish_reason is None:
            engine.step()
            engine.check_integrity()
        assert sequence.new_ids == expected
        assert engine.kv.nbytes > 0
        engine.leave(sequence)
        again = model.generate(IDS[0].tolist(), max_new_tokens=NEW, eos_token_id=None)
        assert again.token_ids == expected


def _settings(model: moe_local.Model) -> Any:
    from moe_local.offload.engine.sampling import make_settings

    return make_settings(model.hf, IDS[0].tolist(), max_new_tokens=NEW, eos_token_id=None)


@pytest.mark.parametrize(
    ("model_type", "overrides", "quantized", "exact"),
    [
        ("switch_transformers", {"d_ff": 128, "num_experts": 1}, "encoder.block.0.layer.1.mlp.wi", "mlp.wo"),
        (
            "deepseek_v32",
            {"index_n_heads": 32, "q_lora_rank": 64, "index_topk": 4},
            "indexer.wq_b",
            "indexer.weights_proj",
        ),
    ],
)
def test_no_weight_is_quantized_whose_dtype_is_looked_at(
    make_checkpoint: Callable[..., Path],
    model_type: str,
    overrides: dict[str, int],
    quantized: str,
    exact: str,
) -> None:
    """What such a layer reads would be turned into bytes.

    Switch's tokens have one expert each, and rounding sends some to another one; so there is only one here.
    """
    folder = make_checkpoint(model_type, **overrides)
    spec = model_spec(read_config(folder))
    for names in (spec.quantizable, spec.quantizable_on_cpu):
        assert any(quantized in name for name in names)
        assert not any(exact in name for name in names)
    inputs = {"decoder_input_ids": IDS} if model_type == "switch_transformers" else {}
    found = []
    for dense in ("fp32", "int8"):
        with moe_local.load(folder, experts="fp32", dense=dense, context=64) as model, torch.inference_mode():
            found.append(model.hf(input_ids=IDS, **inputs).logits.float())
            assert len(model.generate(IDS[0].tolist(), max_new_tokens=3, eos_token_id=None).token_ids) == 3
    errors = (found[1] - found[0]).norm(dim=-1) / found[0].norm(dim=-1)
    assert float(errors.median()) < 0.2


def test_an_expert_that_a_token_has_twice_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    """As a table of DeepSeek V4's that was never filled says."""
    with moe_local.load(make_checkpoint("deepseek_v4"), slots=SLOTS, prefetch="off", **EXACT) as model:
        for name, table in model.hf.named_buffers():
            if "tid2eid" in name:
                table.zero_()
        with pytest.raises(MoeLocalError, match=r"chose an expert twice .*\[0, 0\]") as info:
            model.generate([5], max_new_tokens=2)
        assert "\n" not in str(info.value)
