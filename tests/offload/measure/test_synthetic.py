"""Made models: published sizes, weights of the right scale, files that are kept and finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_local.cache.errors import DoesNotFitError, OptionError
from moe_local.offload.expert_file.expert_file import ExpertFile
from moe_local.offload.expert_file.verify import find_damage
from moe_local.offload.load import load_made
from moe_local.offload.measure import shapes, synthetic
from moe_local.offload.options import LoadOptions
from moe_local.offload.quantize.codec import codec_for
from moe_local.offload.quantize.layout import TensorSpec

PARAMETERS = {
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "glm-4.7-flash": 29_943_390_976,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_404_352,
}
"""As published; of DeepSeek-V3 without the module that predicts a second token."""

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The published shapes at widths that take no time, in a home of their own."""
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))
    published: Callable[[str], dict[str, Any]] = shapes._fields

    def fields(name: str) -> dict[str, Any]:
        found = published(name)
        found |= {key: value for key, value in SMALL.items() if key in found}
        for key in ("num_local_experts", "num_experts", "n_routed_experts"):
            if key in found:
                found[key] = 16
        heads = 4 if name in ("deepseek-v3", "glm-4.7-flash") else 2
        return found | {"num_key_value_heads": heads, "n_group": 4, "topk_group": 2}

    monkeypatch.setattr(shapes, "_fields", fields)
    monkeypatch.setattr(synthetic, "TABLE", (1 << 16) - 3)


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_the_published_ones(name: str) -> None:
    whole = synthetic.describe(name, shapes.published_layers(name))
    assert whole.spec.total_numel == PARAMETERS[name]
    assert str(whole.spec.dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mixtral-8x7b", marks=pytest.mark.slow),
        pytest.param("qwen3-30b-a3b", marks=pytest.mark.slow),
        "glm-4.7-flash",
        "gpt-oss-120b",
        "deepseek-v3",
    ],
)
def test_made_models_answer(small: None, name: str) -> None:
    """Different experts are chosen, and prompts decide what comes."""
    made = synthetic.describe(name, 2)
    told: list[tuple[str, int, int]] = []
    options = LoadOptions(device="cpu", slots=9, context=128, prefetch="off")
    make = lambda: synthetic.make(made, lambda *words: told.append(words))  # noqa: E731
    with load_made(made, make, options) as model:
        answers = [
            model.generate(text, max_new_tokens=8, eos_token_id=None, do_sample=False).token_ids
            for text in ("what is an expert?", "why?")
        ]
        assert answers[0] != answers[1]
        stats = model.stats()
        assert stats.misses > 0
        for counts in stats.routed.counts:
            assert sum(count > 0 for count in counts) > len(counts) // 2
        model.check_integrity()
    assert told
    layers = len(made.spec.layers)
    assert told == [("making", number, layers) for number in range(layers)]
    kept = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*.safetensors")}
    assert sum(path.stat().st_size for path in kept) == pytest.approx(
        made.dense_nbytes + made.experts_nbytes, rel=0.02
    )
    synthetic.make(made)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing is made twice"
    file = ExpertFile.open(made.experts, made.fingerprint, "nf4")
    assert not find_damage(file)
    assert file.read(0, 0) != file.read(0, 1)


def test_an_interrupted_one_is_finished(small: None) -> None:
    made = synthetic.describe("qwen3-30b-a3b", 3)

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.make(made, interrupt)
    assert [path.name for path in made.experts.iterdir()] == ["layer-00000.safetensors"]
    assert not find_damage(synthetic.make(made))


def test_weights_have_the_scale_of_their_input() -> None:
    tensors = (TensorSpec("up", (256, 512)), TensorSpec("bias", (256,)))
    codec = codec_for("nf4")
    layout = codec.layout(tensors)
    noise = torch.randint(0, 256, (100_003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    experts = []
    for seed in (1, 2):
        buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
        synthetic.fill_expert(buffer, layout, noise, seed)
        experts.append(codec.decode(buffer, layout, torch.float32))
    first, second = (expert["up"] for expert in experts)
    assert first.std() == pytest.approx(512**-0.5, rel=0.1)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.02
    assert not experts[0]["bias"].any()


def test_the_numbers_of_a_row_even_out() -> None:
    """Else what all inputs have in common would grow from layer to layer, and all be given to the same
    experts."""
    codec = codec_for("nf4")
    layout = codec.layout((TensorSpec("up", (256, 4096)),))
    noise = torch.randn(100_003, generator=torch.Generator().manual_seed(0)).view(torch.uint8)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    synthetic.fill_expert(buffer, layout, noise, seed=1)
    weights = codec.decode(buffer, layout, torch.float32)["up"]
    sums = weights.sum(dim=1)  # of independent numbers with a mean of zero, about one
    assert sums.abs().mean() < 3
    assert sums.square().mean().sqrt() > 0.3


def test_what_cannot_be_made_is_refused(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="no shape 'mixtral' is known; use one of mixtral-8x7b, "):
        synthetic.describe("mixtral", 1)
    for layers in (0, 33):
        with pytest.raises(OptionError, match=f"layers {layers} of mixtral-8x7b is not from 1 to 32"):
            synthetic.describe("mixtral-8x7b", layers)
    with pytest.raises(OptionError, match="made experts are nf4 only"):
        synthetic.check_format("int8")
    made = synthetic.describe("mixtral-8x7b", 1)
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda folder: type("Disk", (), {"free": 1000}))
    with pytest.raises(DoesNotFitError, match=r"needs .* has 1000 B free; give fewer --layers"):
        synthetic.make(made)
    assert not list(made.folder.rglob("*.safetensors"))


def test_as_many_layers_as_fit(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {n: synthetic.describe("mixtral-8x7b", n) for n in (4, 5)}
    need = {n: made.dense_nbytes + made.experts_nbytes for n, made in sizes.items()}
    room = int((need[4] + need[5]) / 2 / 0.9)
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda folder: type("Disk", (), {"free": room}))
    assert synthetic.most_layers("mixtral-8x7b", 1 << 40) == 4
    assert synthetic.most_layers("mixtral-8x7b", int(1.5 * sizes[4].dense_nbytes)) == 4
    assert synthetic.most_layers("mixtral-8x7b", 1) == 1
