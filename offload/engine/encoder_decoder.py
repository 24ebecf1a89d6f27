"""Encoder-decoder models, made to look to the engine as if they went on with their prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from moe_local.offload.engine.own_caches import OwnCaches, held_bytes


@dataclass(slots=True)
class Translation:
    """What one sequence keeps: the encoder's output for its prompt, and the decoder's cache."""

    cache: Any
    encoded: Any = None

    @classmethod
    def fresh(cls) -> Translation:
        return cls(EncoderDecoderCache(DynamicCache(), DynamicCache()))


class EncoderDecoder:
    """A transformers encoder-decoder called like a causal language model; all else is the model's own.

    The first forward of a sequence is its whole prompt, which the encoder reads, and answers with the logits
    behind the decoder's start token; each further one is a token that the decoder has chosen. Sampling that
    looks back (repetition penalties) sees the prompt, too, where transformers' generate shows it only what
    the decoder has said.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hf, name)

    def __call__(self, **inputs: Any) -> Any:
        return self.forward(**inputs)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Translation,
        use_cache: bool = True,
    ) -> Any:
        """input_ids [1, n]: all of the prompt, or one token. The logits are [1, 1, vocabulary]."""
        if past_key_values.encoded is None:
            past_key_values.encoded = self._hf.get_encoder()(input_ids=input_ids)
            input_ids = torch.full_like(input_ids[:, :1], self._start())
        return self._hf(
            encoder_outputs=past_key_values.encoded,
            decoder_input_ids=input_ids,
            past_key_values=past_key_values.cache,
            use_cache=use_cache,
        )

    def _start(self) -> int:
        for config in (self._hf.generation_config, self._hf.config):
            if (start := getattr(config, "decoder_start_token_id", None)) is not None:
                return int(start)
        return int(self._hf.config.pad_token_id or 0)


class Translations(OwnCaches):
    """A Translation a sequence. A failed forward drops it, and it is computed again, prompt first."""

    def __init__(self, config: Any, rows: int, capacity: int) -> None:
        super().__init__(config, rows, capacity)
        self.whole_prompt_only = True
        self._prompts: list[int] = []

    def _fresh(self) -> Translation:
        return Translation.fresh()

    def join(self) -> int:
        self._prompts.append(0)
        return super().join()

    def leave(self, row: int) -> None:
        prompt = self._prompts.pop()
        if row < len(self._prompts):
            self._prompts[row] = prompt
        super().leave(row)

    def swap(self, one: int, other: int) -> None:
        self._prompts[one], self._prompts[other] = self._prompts[other], self._prompts[one]
        super().swap(one, other)

    def chunk(self, row: int, todo: int, wanted: int) -> int:
        """The prompt at once, then token by token: experts that are full leave out what comes together."""
        if self.lens[row]:
            return 1
        self._prompts[row] = self._prompts[row] or todo
        return self._prompts[row]

    def can_shorten(self, row: int, length: int) -> bool:
        return length == 0

    def shorten(self, row: int, length: int) -> None:
        super().shorten(row, length)
        self._prompts[row] = 0

    @property
    def nbytes(self) -> int:
        total = 0
        for kept in self._caches:
            total += held_bytes(kept.cache.self_attention_cache) + held_bytes(
                kept.cache.cross_attention_cache
            )
            total += 0 if kept.encoded is None else kept.encoded.last_hidden_state.nbytes
        return total

    def check_integrity(self) -> None:
        super().check_integrity()
        assert len(self._prompts) == len(self.lens)


def as_decoder(hf: Any) -> Any:
    """`hf` itself, or, of an encoder-decoder, what the engine can drive."""
    return EncoderDecoder(hf) if getattr(hf.config, "is_encoder_decoder", False) else hf
