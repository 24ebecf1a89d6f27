"""Tiny seeded checkpoints in the Hub's layout: fast to make, with routing that varies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

VOCAB = 320
PAD, BOS, EOS = 0, 1, 2

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "sliding_window": None},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "olmoe": {"num_experts": 8},
    "granitemoe": {"num_local_experts": 8},
    "phimoe": {"num_local_experts": 8},
    "gpt_oss": {
        "num_local_experts": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "qwen3_next": {
        "num_hidden_layers": 4,
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "llama": {},
}
"""By transformers' model type; `llama` is the dense one. Each adds to, or overrides, a common base."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A transformers config of the tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**_BASE, **CONFIGS[model_type], **overrides})


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A transformers model in fp32, on the CPU, in eval mode; the same weights for the same arguments.

    Every matrix keeps the scale of its input, routers and the head triple it, so that which expert and
    which token comes next depend on the text.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name:
                parameter.copy_(noise)
            elif parameter.dim() == 1:
                parameter.add_(0.05 * noise)
            else:
                gain = 3.0 if any(part in name for part in ("router", "gate.weight", "lm_head")) else 1.0
                parameter.copy_(gain / math.sqrt(parameter.shape[-1]) * noise)
    return model


def write_checkpoint(
    folder: Path,
    model_type: str,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Save a tiny model as a Hub folder in about `shards` safetensors files; returns `folder`."""
    model = tiny_model(model_type, seed, **overrides).to(dtype)
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-nbytes // shards) if shards > 1 else "1GB")
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """A byte-level BPE of VOCAB tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (
        "the expert router sends each token of the text to the experts that the model has learned to trust"
    )
    tokenizer.train_from_iterator([words] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )
