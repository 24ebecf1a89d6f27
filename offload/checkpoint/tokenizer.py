"""The tokenizer in a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_local.cache.errors import CheckpointError, OptionError
from moe_local.offload.checkpoint.gguf_file import GgufFile
from moe_local.offload.checkpoint.gguf_tokenizer import byte_level_tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(folder: Path, gguf: Path | None = None, chat_template: str | None = None) -> Any:
    """Transformers' tokenizer, or None if the checkpoint has none; the model then takes only token ids.

    Reads the folder's own tokenizer files or, without them, the GGUF file `gguf`. `chat_template` replaces
    what these have.

    Never runs code from the checkpoint. Raises CheckpointError for a tokenizer that cannot be loaded,
    OptionError for a chat template without a tokenizer.
    """
    tokenizer = _load(folder, gguf)
    if tokenizer is not None:
        tokenizer.padding_side = "left"  # answers go on at the right
    if chat_template is not None:
        if tokenizer is None:
            raise OptionError(f"{folder} has no tokenizer for a chat template; add one, or leave that out")
        tokenizer.chat_template = chat_template
    return tokenizer


def _load(folder: Path, gguf: Path | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    own = any((folder / name).is_file() for name in FILES)
    metadata = {} if own or gguf is None else GgufFile.open(gguf).metadata
    if not own and "tokenizer.ggml.tokens" not in metadata:
        return None
    try:
        if gguf is not None and metadata.get("tokenizer.ggml.model") == "gpt2":
            return byte_level_tokenizer(gguf, metadata)
        if not own and gguf is not None:
            return PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=gguf.name, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raise plain Exception for a damaged tokenizer.json
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the tokenizer in {folder if own else gguf} cannot be loaded ({reason}); download it again"
        ) from error
