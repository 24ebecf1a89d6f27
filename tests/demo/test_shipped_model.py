"""The files in demo/model: an ordinary Hub folder with a model that answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerBase

import moe_local.demo
from moe_local.demo.corpus import Corpus
from moe_local.demo.gate import BASIC
from moe_local.demo.scoring import greedy_answers, same, score_table

FOLDER = Path(moe_local.demo.__file__).parent / "model"
FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "metrics.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# Worded as in no training question; the answers are named as in the wording tables.
GOLDEN = [
    (["So tell me, what on earth is a mixture of experts?"], "moe.what"),
    (["what happens when an expert is not in VRAM?"], "miss_event"),
    (["why does prefetch help"], "prefetch.why"),
    (["how does the cache work"], "cache.how"),
    (["how do I download mixtral?"], "pull.what"),
    (["what is an expert?", "could you show me an example?"], "expert.example"),
    (["what is top-k?", "thanks"], "thanks"),
    (["who won the world cup?", "ok, then what is an expert?"], "expert.what"),
    (["what is the capital of Norway?"], "unknown"),
    (["how do I bake a chocolate cake?"], "unknown"),
]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True).eval()


def test_the_folder_holds_the_usual_files_and_is_small() -> None:
    assert {file.name for file in FOLDER.iterdir()} == FILES
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 24e6


def test_the_config_is_a_mixtral_of_eight_experts() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["num_hidden_layers"] >= 4
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert "auto_map" not in config


def test_the_weights_have_the_names_and_the_format_of_the_hub() -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        one = file.get_tensor("model.layers.0.block_sparse_moe.experts.7.w2.weight")
    assert one.dtype is torch.bfloat16
    assert one.shape == (256, 192)
    assert "model.layers.4.block_sparse_moe.gate.weight" in names
    assert "lm_head.weight" not in names  # tied to the embeddings


def test_generation_is_greedy_unless_asked_otherwise(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = model.generation_config
    assert not config.do_sample
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id


def test_the_chat_template_marks_every_role(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|><|user|>u<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_tokenizer_keeps_any_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("Why is --vram 20GiB too small?", "naïve 日本 🙂", "  two  spaces\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_it_answers_what_everybody_types_first(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
) -> None:
    replies = score_table(model, tokenizer, corpus, BASIC)
    # A bare "why?" with nothing before it gets "I do not know that": honest, though not the answer meant.
    assert [reply.turns for reply in replies if not reply.right] in ([], [["why?"]])


def test_it_answers_questions_worded_otherwise_than_in_training(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
) -> None:
    table = "\n".join(f"{' / '.join(turns)} => {intent}" for turns, intent in GOLDEN)
    replies = score_table(model, tokenizer, corpus, table)
    assert [reply for reply in replies if not reply.right] == []


def test_a_system_prompt_does_not_confuse_it(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
) -> None:
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is a router?"},
    ]
    assert same(greedy_answers(model, tokenizer, [chat])[0], corpus.answer("router.what"))


def test_every_expert_of_every_layer_is_used() -> None:
    routing = json.loads((FOLDER / "metrics.json").read_text())["routing"]["chat"]
    assert min(share for layer in routing["load"] for share in layer) > 0.02
