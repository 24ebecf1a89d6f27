"""Tokenizers that are made from a GGUF file's metadata."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from moe_local.cache.errors import CheckpointError
from moe_local.offload.checkpoint.checkpoint import Checkpoint
from moe_local.offload.checkpoint.gguf_families import FAMILIES
from moe_local.offload.checkpoint.gguf_tokenizer import SPLITS, splitters
from moe_local.offload.checkpoint.tokenizer import load_tokenizer
from support import gguf_models, tiny_models

TEXT = "the expert router sends each token"


@pytest.fixture(scope="module")
def write(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """write("qwen3_moe", split="qwen2") -> a GGUF file with the tiny tokenizer."""

    def write(model_type: str, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(model_type) / "gguf"
        tokenizer = tiny_models.tiny_tokenizer()
        return gguf_models.write(make_checkpoint(model_type), folder, {}, tokenizer=tokenizer, **options)[0]

    return write


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("qwen3_moe", {"split": "qwen2"}), ("gpt_oss", {"split": "default", "ollama": True}), ("glm4_moe", {})],
)
def test_it_has_the_same_ids(write: Callable[..., Path], model_type: str, options: dict[str, Any]) -> None:
    """Also for a file that does not say how text is split, which is the family's then."""
    checkpoint = Checkpoint.open(write(model_type, **options))
    found, tokenizer = load_tokenizer(checkpoint.folder, checkpoint.gguf), tiny_models.tiny_tokenizer()
    for text in (TEXT, f"<|user|>{TEXT}<|end|>", "sends  1234\n\nto"):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = found(f"<|user|>{TEXT}<|end|>")["input_ids"]
    assert found.decode(ids, skip_special_tokens=True) == f"<|user|>{TEXT}"  # user-defined, not special
    assert (found.eos_token_id, found.bos_token_id) == (2, None)
    messages = [{"role": "user", "content": TEXT}]
    rendered = found.apply_chat_template(messages, tokenize=False)
    assert rendered == tokenizer.apply_chat_template(messages, tokenize=False)
    ends = checkpoint.config.eos_token_id
    assert 2 in ends if isinstance(ends, list) else ends == 2


def test_a_first_token_if_the_file_wants_one(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write("qwen3_moe", split="qwen2")
    raw = path.read_bytes()
    (fields,) = struct.unpack("<Q", raw[16:24])
    more = b"".join(
        struct.pack("<Q", len(key)) + key + struct.pack(f"<I{kind}", number, value)
        for key, number, kind, value in (
            (b"tokenizer.ggml.bos_token_id", 4, "I", 1),
            (b"tokenizer.ggml.add_bos_token", 7, "?", True),
        )
    )
    described = raw[:16] + struct.pack("<Q", fields + 2) + more + raw[24:]
    (tmp_path / "x.gguf").write_bytes(described + bytes(64))  # tensors, which are not read, move a little
    found = load_tokenizer(tmp_path, tmp_path / "x.gguf")
    assert found(TEXT)["input_ids"] == [1, *tiny_models.tiny_tokenizer()(TEXT)["input_ids"]]
    assert found(TEXT, add_special_tokens=False)["input_ids"] == found(TEXT)["input_ids"][1:]


def test_a_way_of_splitting_that_is_not_known(write: Callable[..., Path]) -> None:
    path = write("qwen3_moe", split="poro-chat")
    with pytest.raises(CheckpointError, match="text is split as 'poro-chat', which is not known") as caught:
        load_tokenizer(path.parent, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("split", "text", "pieces"),
    [
        ("qwen2", "It's 123 HelloWorld/\n x", ["It", "'s", " ", "1", "2", "3", " HelloWorld", "/\n", " x"]),
        ("qwen2", "e\u0301a", ["e", "\u0301a"]),
        ("qwen35", "e\u0301a 12", ["e\u0301a", " ", "1", "2"]),
        ("glm4", "It's 1234!\n\n  x", ["It", "'s", " ", "123", "4", "!\n\n", " ", " x"]),
        ("gpt-4o", "It's 1234 HelloWORLD //\n", ["It's", " ", "123", "4", " Hello", "WORLD", " //\n"]),
        ("gpt-4o", "a\n/b  c", ["a", "\n", "/b", " ", " c"]),
        ("deepseek-v3", "It's 1234 ok,then", ["It", "'s", " ", "123", "4", " ok", ",then"]),
        ("deepseek-v3", "a\u4f60\u3042b[x]\n", ["a", "\u4f60\u3042", "b", "[x", "]\n"]),
    ],
)
def test_how_text_is_split(split: str, text: str, pieces: list[str]) -> None:
    splitter = pre_tokenizers.Sequence(splitters(split))
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == pieces


def test_every_family_splits_in_a_known_way() -> None:
    """Mixtral and Gemma have tokenizers of another kind."""
    assert {family.split for family in FAMILIES.values()} == {*SPLITS, ""}
