"""Makes a tokenizer from a GGUF file's metadata: byte-level BPE, as in all families but Mixtral and Gemma.

Transformers' own way depends on its release: some believe a GGUF file about how text is split before merges,
others split it in a way of their own, and only some know gpt-oss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.gguf_families import family_of
from moe_local.offload.checkpoint.gguf_file import read_arrays

PREFIX = "tokenizer.ggml."
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens: special ones, and others that are found in a text before it is split."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
SPLITS: dict[str, str | tuple[str, ...]] = {
    "qwen2": _QWEN2,
    "qwen35": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
    ),
    "glm4": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "gpt-4o": _GPT_4O,
    "minimax-m2": _GPT_4O,
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ),
}
"""How text is split before tokens are merged, by llama.cpp's names; several: each splits the pieces of those
before it."""
NORMALIZED = ("qwen2", "qwen35")
"""Those whose texts are normalized (NFC) first."""


def splitters(split: str) -> list[Any]:
    """The parts of a pre-tokenizer that split text in this way."""
    from tokenizers import Regex, pre_tokenizers

    rules = SPLITS[split]
    rules = (rules,) if isinstance(rules, str) else rules
    return [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in rules]


def byte_level_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Any:
    """Transformers' tokenizer of a GGUF file with this metadata, whose tokenizer.ggml.model is "gpt2".

    Raises CheckpointError for text that is split in an unknown way, and exceptions of other types for tokens
    that make no sense.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    said = metadata.get(f"{PREFIX}pre") or "default"
    split = family_of(path, metadata).split if said == "default" else said
    if split not in SPLITS:
        raise CheckpointError(
            f"{path} says that text is split as {str(said)[:80]!r}, which is not known; put the model's "
            "tokenizer.json beside it"
        )
    arrays = read_arrays(path, {f"{PREFIX}{name}" for name in ("tokens", "merges", "token_type")})
    tokens = arrays.get(f"{PREFIX}tokens", [])
    merges = [tuple(pair.split(" ", 1)) for pair in arrays.get(f"{PREFIX}merges", [])]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    if split in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *splitters(split),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, arrays.get(f"{PREFIX}token_type", []), strict=False))
    special = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in kinds if kind == USER_DEFINED]
    )
    if metadata.get(f"{PREFIX}add_bos_token"):
        number = metadata[f"{PREFIX}bos_token_id"]
        begin = {"id": "begin", "ids": [number], "tokens": [tokens[number]]}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="begin $A", pair="begin $A $B", special_tokens=[begin]
        )
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"{PREFIX}{key}_token_id") for name, key in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: None if number is None else tokens[number] for name, number in ids.items()},
    )
