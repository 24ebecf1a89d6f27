"""The bytes of single tokens: a token may be half a character, which text cannot represent."""

from __future__ import annotations

from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from moe_local.offload.engine.text import BYTE_TOKEN, REPLACEMENT

BYTE_LETTERS: dict[str, int] = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""The letters by which byte-level vocabularies like GPT-2's represent bytes."""


class TokenBytes:
    """The bytes of every token as it occurs within a text; special tokens have the bytes of their names.

    The bytes of a text's tokens, joined, are the text, except for a space that some tokenizers drop at its
    start.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: of transformers, fast or slow."""
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        """The token's bytes; empty for ids without a name, which models with padded matrices have."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return b""
        if BYTE_TOKEN.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        alone = self._decode(token)
        if REPLACEMENT in alone and all(letter in BYTE_LETTERS for letter in name):
            return bytes(BYTE_LETTERS[letter] for letter in name)
        # Decoders drop the space of a text's first word, so the token is decoded as the second of two.
        return self._decode(token, token)[len(alone) :].encode()

    def _decode(self, *ids: int) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
