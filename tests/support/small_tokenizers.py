"""A small tokenizer of sentencepiece's kind, whose unknown characters are byte tokens."""

from __future__ import annotations

from typing import Any

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁the", "▁expert", "s", "e", "router", "▁▁", "你好", "é", "😀", "▁.", ".", "\ufffd"]


def sentencepiece_like(metaspace: bool) -> Any:
    """A vocabulary with byte tokens, decoded as Llama's and Mixtral's tokenizers do, or by Metaspace."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        if metaspace
        else decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
