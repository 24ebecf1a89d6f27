"""The tokenizer in a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_local.cache.errors import CheckpointError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer, or None if the folder has none: then the model takes token ids only.

    Never runs code from the checkpoint. Raises CheckpointError if there is one that cannot be loaded.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise plain Exception for a damaged tokenizer.json
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded ({reason}); download it again"
        ) from error
